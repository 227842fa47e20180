"""What lies in a folder: silos of pictures with texts, and models."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fedcmp.extract.encoders.transformers import FAMILIES
from fedcmp.extract.sources import IMAGE_SUFFIXES
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json

_DEPTH = 4
_LOOKED_AT = 1_000_000
_IMAGE_FOLDERS = (".", "images", "image", "imgs", "pictures", "photos")
# Between a small silo's pictures and a model's tokenizer, only the former has so many.
_PICTURES = 3


@dataclass
class Found:
    """What was found.

    Attributes:
        silos: Options of the source of each silo, by its name.
        encoders: Options of encoders.
        languages: Directories of LLMs.
        unused: What looks useful but is not taken, with the reason.
    """

    silos: dict[str, dict[str, str]] = field(default_factory=dict)
    encoders: list[dict[str, str]] = field(default_factory=list)
    languages: list[Path] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def discover(folder: Path) -> Found:
    """Look through a folder, four levels deep; nothing is opened but the first bytes of JSON files.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = Found()
    for place, folders, names in _walk(folder):
        if _model(place, names, found):
            folders.clear()
            continue
        pictures = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        for name in names:
            if name.endswith((".json", ".jsonl")):
                _pairs(place / name, found)
            elif name.endswith(".gguf"):
                found.unused.append(f"{place / name} is GGUF: fedcmp convert {place / name} --out DIR")
        for suffix, source in ((".tar", "webdataset"), (".parquet", "parquet")):
            if any(name.endswith(suffix) for name in names):
                _add(found, place.name, {"name": source, "path": f"{place}/*{suffix}"})
        beside = sum(name.endswith(".txt") for name in names)
        if pictures >= _PICTURES and beside >= pictures / 2:
            _add(found, place.name, {"name": "image_folder", "path": str(place)})
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not name.endswith(".zarr")
        )
        yield Path(place), folders, sorted(names)
        if len(Path(place).relative_to(folder).parts) >= _DEPTH:
            folders.clear()


def _model(place: Path, names: list[str], found: Found) -> bool:
    """Take a saved model's directory; whether it is one."""
    if "open_clip_config.json" in names:
        found.encoders.append({"name": "open_clip", "model": f"local-dir:{place}"})
        return True
    config: Any = _json(place / "config.json") if "config.json" in names else None
    if not isinstance(config, dict):
        return False
    kind = config.get("model_type")
    if kind in FAMILIES:
        found.encoders.append({"name": "transformers", "path": str(place)})
    elif isinstance(config.get("architecture"), str):
        found.encoders.append({"name": "timm", "model": f"local-dir:{place}"})
    elif any("CausalLM" in str(name) for name in config.get("architectures") or ()):
        found.languages.append(place)
    elif kind is not None:
        found.unused.append(f"{place}: a model of type '{kind}', neither a vision encoder nor a causal LM")
    return kind is not None or "architecture" in config


def _pairs(path: Path, found: Found) -> None:
    """Take a file of pairs in LLaVA's form, if it is one and its pictures are found."""
    entry = _first(path)
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        return
    if "conversations" not in entry and "caption" not in entry:
        return
    for base in (path.parent, path.parent.parent):
        for name in _IMAGE_FOLDERS:
            if (base / name / entry["image"]).is_file():
                source = {"name": "llava_json", "path": str(path), "images": os.path.normpath(base / name)}
                name = path.parent.name if path.stem in ("pairs", "captions", "train", "data") else path.stem
                _add(found, name, source)
                return
    found.unused.append(f"{path}: its first picture, {entry['image']}, is in no folder beside it")


def _add(found: Found, name: str, source: dict[str, str]) -> None:
    cleaned = plain(name, "silo")
    unique = next(
        each for each in (cleaned, *(f"{cleaned}-{n}" for n in range(2, 10_000))) if each not in found.silos
    )
    found.silos[unique] = source


def plain(name: str, otherwise: str) -> str:
    """A name as experiment files may have it: ASCII, without what stands for a part of a letter."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", letters).strip("._-") or otherwise


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except UserError:
        return None


def _first(path: Path) -> Any:
    """The first entry of a JSON list or of JSON lines, from the file's first bytes; None of anything else."""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = "".join(islice(iter(lambda: file.read(65536), ""), _LOOKED_AT // 65536)).lstrip(
            "\ufeff \n\r\t["
        )
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except ValueError:
        return None
