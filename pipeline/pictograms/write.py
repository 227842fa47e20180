"""Write the study's data: OpenMoji's pictograms, two of its groups a silo, in LLaVA's form.

<out>/silos/<silo>.json             named pictures with a yes/no question each, to train on
<out>/validation.json, heldout.json captions of pictures that nobody trains on
<out>/benchmarks/                   the question and COCO captions over the held-out pictures
<out>/images/                       PNG, 128 pixels
<out>/models/                       the encoder and the LLM
<out>/manifest.json                 written last
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.pipeline.console import progress
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic, write_json
from fedcmp.pipeline.manifest import withdraw_manifest, write_manifest
from fedcmp.pipeline.models.prompts import CAPTION_PROMPT
from fedcmp.pipeline.pictograms.models import write_encoder, write_language
from fedcmp.pipeline.pictograms.pinned import ENCODER, LANGUAGE, PICTURES

# OpenMoji's groups, and whether a picture of each shows a living thing or a face.
GROUPS = {
    "animals-nature": True,
    "food-drink": False,
    "people-body": True,
    "objects": False,
    "smileys-emotion": True,
    "travel-places": False,
}
QUESTION = "Does this picture show a living thing or a face?"
# Every group is in two silos, and every silo has one of either kind.
SILOS = {
    f"site{number + 1}": (group, [*GROUPS][(number + 1) % len(GROUPS)]) for number, group in enumerate(GROUPS)
}
SIDE = 128
_TABLE = "package/data/openmoji.csv"
_PICTURE = "package/color/svg/{}.svg"


@dataclass(frozen=True)
class Pictogram:
    """A named picture of one of the groups."""

    code: str
    name: str
    group: str

    @property
    def image(self) -> str:
        """Its file below `images/`."""
        return f"{self.code}.png"


def write(out: Path, *, seed: int = 0, most: int = 160) -> dict[str, int]:
    """Download, draw and split; the same seed gives the same files.

    Args:
        out: Directory to write.
        seed: Of what is held out.
        most: Pictures of a group at most, drawn at random.

    Returns:
        Pictures of every split: the silos by name, `validation` and `heldout`.

    Raises:
        UserError: A download failed, or a package of the extra `study` is missing.
    """
    withdraw_manifest(out)
    downloads = out / "downloads"
    package = PICTURES.fetch(downloads)
    rng = np.random.default_rng(seed)
    silos, held = split(read(package), most, rng)
    draw(package, [each for part in [*silos.values(), *held.values()] for each in part], out / "images")
    for name, silo in silos.items():
        entries = [entry for each in silo for entry in (_captioned(each), _asked(each))]
        write_json(out / "silos" / f"{name}.json", entries)
    for name, pictures in held.items():
        write_json(out / f"{name}.json", [_captioned(each) for each in pictures])
    _write_benchmarks(out / "benchmarks", held["heldout"])
    write_encoder(ENCODER.fetch(downloads), out / "models/encoder")
    write_language(LANGUAGE.fetch(downloads), out / "models/language")
    counts = {name: len(part) for name, part in (silos | held).items()}
    sources = [asdict(each) for each in (PICTURES, ENCODER, LANGUAGE)]
    write_manifest(out, {"seed": seed, "most": most, "pictures": counts, "sources": sources})
    return counts


def read(package: Path) -> list[Pictogram]:
    """Pictograms of the six groups without variants of skin tone, every name and every drawing once."""
    with tarfile.open(package) as archive:
        drawings = {
            Path(member.name).stem: _file(archive, member).read()
            for member in archive
            if member.name.startswith("package/color/svg/") and member.isfile()
        }
        rows = list(csv.DictReader(io.TextIOWrapper(_file(archive, _TABLE), encoding="utf-8", newline="")))
    found: dict[str, Pictogram] = {}
    seen = set()
    for row in rows:
        code, name, group = row["hexcode"], row["annotation"], row["group"]
        if group in GROUPS and not row["skintone"] and name not in found and drawings[code] not in seen:
            seen.add(drawings[code])
            found[name] = Pictogram(code, name, group)
    return list(found.values())


def split(
    pictures: Sequence[Pictogram], most: int, rng: np.random.Generator
) -> tuple[dict[str, list[Pictogram]], dict[str, list[Pictogram]]]:
    """Silos by name, and `validation` and `heldout` with a tenth and a fifth of every group."""
    silos: dict[str, list[Pictogram]] = {name: [] for name in SILOS}
    held: dict[str, list[Pictogram]] = {"validation": [], "heldout": []}
    for group in GROUPS:
        own = [each for each in pictures if each.group == group]
        own = [own[place] for place in rng.permutation(len(own))[:most]]
        tenth = len(own) // 10
        held["validation"] += own[:tenth]
        held["heldout"] += own[tenth : 3 * tenth]
        for place, name in enumerate(name for name, groups in SILOS.items() if group in groups):
            silos[name] += own[3 * tenth + place :: 2]
    return silos, held


def draw(package: Path, pictures: Sequence[Pictogram], out: Path) -> None:
    """Draw SVG files as PNG on white.

    Raises:
        UserError: The package `resvg_py` is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError("pictograms are drawn by resvg_py; pip install 'fedcmp[study]'") from None
    wanted = {_PICTURE.format(each.code): each for each in pictures}
    with tarfile.open(package) as archive, progress("pictograms", len(wanted), "images") as task:
        for member in archive:
            if member.name in wanted:
                text = _file(archive, member).read().decode()
                picture = svg_to_bytes(svg_string=text, width=SIDE, height=SIDE, background="white")
                write_atomic(out / wanted[member.name].image, bytes(picture))
                task.advance()


def _file(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> Any:
    file = archive.extractfile(member)
    assert file is not None, member
    return file


def _conversation(picture: Pictogram, asked: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
    return {"id": picture.code, "image": picture.image, "conversations": turns}


def _captioned(picture: Pictogram) -> dict[str, Any]:
    return _conversation(picture, CAPTION_PROMPT, picture.name)


def _asked(picture: Pictogram) -> dict[str, Any]:
    return _conversation(picture, QUESTION, _answer(picture))


def _answer(picture: Pictogram) -> str:
    return "Yes" if GROUPS[picture.group] else "No"


def _write_benchmarks(out: Path, pictures: Sequence[Pictogram]) -> None:
    images = [{"id": n, "file_name": each.image} for n, each in enumerate(pictures)]
    captions = [{"id": n, "image_id": n, "caption": each.name} for n, each in enumerate(pictures)]
    write_json(out / "captions.json", {"images": images, "annotations": captions})
    rows = (
        {"image": each.image, "question": QUESTION, "answer": _answer(each), "group": each.group}
        for each in pictures
    )
    write_atomic(out / "living.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
