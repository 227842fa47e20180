"""Split one data set into silos: by a field, with skewed labels, by quantity, or by hash.

How images are dealt out is arithmetic on their names and labels (`by_hash`, `dirichlet`, `by_quantity`,
`by_field`); all texts of an image go with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedcmp.extract.deal import Partition, deal
from fedcmp.extract.sources.base import NO_FILE, SOURCES, Pair, Skipped, Source
from fedcmp.extract.sources.llava_json import LlavaJson
from fedcmp.extract.sources.parquet import Parquet
from fedcmp.pipeline.console import say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked, write_atomic
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.manifest import read_manifest, withdraw_manifest, write_manifest
from fedcmp.pipeline.options import Component, validate
from fedcmp.pipeline.records import Text, improper
from fedcmp.pipeline.remote import is_url

_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Silo:
    """What a silo got."""

    name: str
    lines: bytes
    images: int
    texts: int
    labels: Counter[str]


def partition(
    source: str,
    out: Path,
    options: Partition,
    *,
    images: str | None = None,
    write_images: bool = False,
    overwrite: bool = False,
) -> None:
    """Write one JSON lines file a silo, say what each got, and print the configuration for it.

    Args:
        source: LLaVA JSON or JSON lines, or a `.toml` with a source's name and options.
        out: Folder for the files; its manifest is written last.
        options: How to split.
        images: Folder that images are relative to, for the configuration; by default the source's own.
        write_images: Write the pictures into the folder `images` of `out`, too.
        overwrite: Replace another partition.

    Raises:
        UserError: The source or an option is unusable, or another partition is there.
    """
    if images is not None and write_images:
        raise UserError("--images and --write-images both say where images are; pass one")
    reader = _reader(source, images)
    if options.field is not None and isinstance(reader, Parquet):
        reader = reader.labelled(options.field)
    made_from = {
        "format": {"name": "fedcmp-partition", "version": 1},
        "options": options.model_dump(mode="json"),
        "source": reader.identity(),
    }
    made = read_manifest(out)
    if made is not None and made.get("fingerprint") != fingerprint(made_from) and not overwrite:
        raise UserError(f"{out}: another partition is there; give another folder, or pass --overwrite")
    skipped: list[Skipped] = []
    pairs = list(_pairs(reader, options, skipped))
    silos = _split(options, pairs, skipped)
    with locked(out / ".lock", str(out)):
        if write_images:
            images = str(out / "images")
            _write_images(reader, Path(images), {pair.image for pair in pairs}, skipped)
        state = _write(out, silos, made_from)
    _report(source, out, silos, skipped, state)
    for line in _snippet(reader, source, out, silos, images).splitlines():
        say(line)


def _reader(source: str, images: str | None) -> Source:
    if not source.endswith(".toml"):
        folder = images or (source.rpartition("/")[0] if is_url(source) else str(Path(source).parent))
        return validate(LlavaJson, {"path": source, "images": folder}, "", source)
    try:
        component = validate(Component, tomllib.loads(Path(source).read_text(encoding="utf-8")), "", source)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; give LLaVA JSON or a source's options") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not valid TOML: {error}") from None
    return SOURCES.build(component, source)


@dataclass(frozen=True)
class _Labelled:
    image: str
    label: str
    line: bytes


def _pairs(reader: Source, options: Partition, skipped: list[Skipped]) -> Iterator[_Labelled]:
    label_of = _labeller(options, reader)
    for pair in _entries(reader, options.field):
        if isinstance(pair, Skipped):
            skipped.append(pair)
            continue
        try:
            label = label_of(pair)
            line = json.dumps(pair.entry, ensure_ascii=False).encode() + b"\n"
        except ValueError as error:
            skipped.append(Skipped(pair.place, str(error)))
            continue
        yield _Labelled(pair.image, label, line)


def _entries(reader: Source, field: str | None) -> Iterator[Pair | Skipped]:
    if isinstance(reader, LlavaJson):
        yield from reader.pairs()
        return
    for record in reader.records():
        if isinstance(record, Skipped):
            yield record
        elif why := improper(record.id):
            yield Skipped(ascii(record.id)[1:-1], f"its name cannot be that of an image: {why}")
        elif not record.texts:
            yield Skipped(record.id, "no text is about it")
        else:
            for text, label in zip_longest(record.texts, record.labels):
                labelled = {} if field is None or label is None else {field: label}
                yield Pair(record.id, record.id, text, {**labelled, "image": record.id, **_as_llava(text)})


def _as_llava(text: Text) -> dict[str, Any]:
    if text.kind == "caption":
        return {"caption": text.turns[0].content}
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[turn.role], "value": turn.content} for turn in text.turns]
    if text.rejected is None:
        return {"conversations": turns}
    answers = {"chosen": text.turns[-1].content, "rejected": text.rejected}
    return {"conversations": turns[:-1], **answers} if turns[:-1] else answers


def _labeller(options: Partition, reader: Source) -> Any:
    ways = {"--field": options.field, "--component": options.component, "--pattern": options.pattern}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both give the label; pass one")
    if not given and options.by in ("field", "dirichlet"):
        raise UserError(f"--by {options.by} needs a label: pass --field, --component or --pattern")
    if options.field is not None:
        if not isinstance(reader, LlavaJson | Parquet):
            raise UserError(
                "--field: only LLaVA JSON and tables have fields; take the label from the path with --pattern"
            )
        keys = options.field.split(".") if isinstance(reader, LlavaJson) else [options.field]
        return lambda pair: _field(pair.entry, keys)
    if options.component is not None:
        return lambda pair: _component(pair.image, options.component or 0)
    if options.pattern is not None:
        try:
            pattern = re.compile(options.pattern)
        except re.error as error:
            raise UserError(f"--pattern {options.pattern}: not a regular expression: {error}") from None
        return lambda pair: _matched(pair.image, pattern)
    return lambda pair: ""


def _field(entry: Any, keys: Sequence[str]) -> str:
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            raise ValueError(f"it has no '{'.'.join(keys)}'")
        entry = entry[key]
    if not isinstance(entry, str | int | float) or not str(entry).strip():
        raise ValueError(f"its '{'.'.join(keys)}' is no text or number")
    return str(entry).strip()


def _component(image: str, place: int) -> str:
    parts = image.split("/")
    if not -len(parts) <= place < len(parts):
        raise ValueError(f"'{image}' has no part {place}")
    return parts[place]


def _matched(image: str, pattern: re.Pattern[str]) -> str:
    match = pattern.search(image)
    label = match[1 if pattern.groups else 0] if match else None
    if not label:
        raise ValueError(f"'{image}' does not match '{pattern.pattern}'")
    return label


def _split(options: Partition, pairs: Sequence[_Labelled], skipped: Sequence[Skipped]) -> list[Silo]:
    if not pairs:
        why = f"; first, {skipped[0].place}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"no text is left to split{why}")
    labels: dict[str, str] = {}
    for pair in pairs:
        labels.setdefault(pair.image, pair.label)
    several = len({pair.image for pair in pairs if pair.label != labels[pair.image]})
    if several:
        say(f"{several} images have texts of different labels; the first text's counts")
    silo, names = deal(options, list(labels), list(labels.values()))
    place = dict(zip(labels, silo.tolist(), strict=True))
    texts_of: list[list[_Labelled]] = [[] for _ in names]
    for pair in pairs:
        texts_of[place[pair.image]].append(pair)
    silos = []
    for name, mine in zip(names, texts_of, strict=True):
        histogram = Counter(labels[image] for image in dict.fromkeys(pair.image for pair in mine))
        lines = b"".join(pair.line for pair in mine)
        silos.append(Silo(name, lines, histogram.total(), len(mine), histogram))
    if sum(each.images for each in silos) != len(labels) or sum(each.texts for each in silos) != len(pairs):
        raise AssertionError("an image or text is in no silo or in several")
    return silos


def _write(out: Path, silos: Sequence[Silo], made_from: dict[str, Any]) -> str:
    files = {f"{silo.name}.jsonl": hashlib.sha256(silo.lines).hexdigest() for silo in silos}
    manifest = {
        **made_from,
        "fingerprint": fingerprint(made_from),
        "silos": {
            silo.name: {"images": silo.images, "texts": silo.texts, "labels": dict(silo.labels.most_common())}
            for silo in silos
        },
        "files": files,
    }
    made = read_manifest(out)
    if made == manifest and all((out / name).is_file() for name in files):
        return "unchanged"
    withdraw_manifest(out)
    for name in (made or {}).get("files", {}):
        if name not in files and Path(name).name == name and name.endswith(".jsonl"):
            (out / name).unlink(missing_ok=True)
    for silo in silos:
        write_atomic(out / f"{silo.name}.jsonl", silo.lines)
    write_manifest(out, manifest)
    return "written"


def _write_images(reader: Source, folder: Path, names: Set[str], skipped: list[Skipped]) -> None:
    """Write pictures of these names; those that are there already keep their time, which identifies them.

    Raises:
        UserError: One would be a file and a folder at once.
    """
    for record in reader.records():
        if isinstance(record, Skipped) or record.id not in names:
            continue
        file = folder / record.id
        try:
            data = record.read_image()
        except NO_FILE as error:
            skipped.append(Skipped(record.id, str(error)))
            continue
        try:
            if not (file.is_file() and file.read_bytes() == data):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise UserError(f"{file}: another picture's name is its folder ({error.strerror})") from None
    # Once for all: what is torn is written again, unless a manifest says that it is whole.
    os.sync()


def _report(source: str, out: Path, silos: Sequence[Silo], skipped: Sequence[Skipped], state: str) -> None:
    labelled = any(label for silo in silos for label in silo.labels)
    table(
        f"{source} in {len(silos)} silos: {out} ({state})",
        ["silo", "images", "texts", *(["most frequent labels"] if labelled else [])],
        [
            [silo.name, f"{silo.images:,}", f"{silo.texts:,}", *([_top(silo.labels)] if labelled else [])]
            for silo in silos
        ],
    )
    for item in skipped[:_PROBLEMS_SHOWN]:
        say(f"skipped {item.place}: {item.reason}")
    if len(skipped) > _PROBLEMS_SHOWN:
        say(f"  and {len(skipped) - _PROBLEMS_SHOWN} more")


def _top(labels: Counter[str]) -> str:
    return ", ".join(f"{label} {count / labels.total():.0%}" for label, count in labels.most_common(3))


def _snippet(reader: Source, source: str, out: Path, silos: Sequence[Silo], images: str | None) -> str:
    folder = images
    note = ""
    if folder is None:
        beside = isinstance(reader, LlavaJson | Parquet)
        own = reader.images if isinstance(reader, LlavaJson | Parquet) else getattr(reader, "path", None)
        folder = str(own)
        if own is None or not (beside or is_url(folder) or Path(folder).is_dir()):
            folder = "IMAGES"
            note = (
                f"# Pass --write-images, or unpack the pictures of {source} into IMAGES (shards: tar -xf).\n"
            )
    split = "" if reader.split == "train" else f", split = {_quoted(reader.split)}"
    lines = [
        f'{_key(silo.name)} = {{ name = "llava_json", path = {_quoted(str(out / f"{silo.name}.jsonl"))}, '
        f"images = {_quoted(folder)}{split} }}"
        for silo in silos
        if silo.images
    ]
    return "\n".join([f"\n{note}[extract.silos]", *lines])


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
