"""Write the study's data: OpenMoji's pictograms, a silo for each of its groups, in LLaVA's form.

<out>/silos/<group>.json            named pictures with one yes/no question each, to train on
<out>/validation.json, heldout.json captions of pictures that nobody trains on
<out>/benchmarks/                   POPE and COCO caption files over the held-out pictures
<out>/images/                       PNG, 128 pixels
<out>/models/                       the encoder and the LLM
<out>/manifest.json                 written last
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
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

GROUPS = ("animals-nature", "food-drink", "objects", "people-body", "smileys-emotion", "travel-places")
SIDE = 128
_TABLE = "package/data/openmoji.csv"
_PICTURE = "package/color/svg/{}.svg"


@dataclass(frozen=True)
class Pictogram:
    """A named picture; `kind` is its subgroup, such as `animal-bird`."""

    code: str
    name: str
    group: str
    kind: str

    @property
    def image(self) -> str:
        """Its file below `images/`."""
        return f"{self.code}.png"


def write(out: Path, *, seed: int = 0, most: int = 160) -> dict[str, int]:
    """Download, draw and split; the same seed gives the same files.

    Args:
        out: Directory to write.
        seed: Of what is held out, and of the questions.
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
    kinds = {group: sorted({each.kind for each in silo}) for group, silo in silos.items()}
    draw(package, [each for part in [*silos.values(), *held.values()] for each in part], out / "images")
    for group, silo in silos.items():
        entries = [entry for each in silo for entry in _lessons(each, kinds[group], rng)]
        write_json(out / "silos" / f"{group}.json", entries)
    for name, pictures in held.items():
        write_json(out / f"{name}.json", [_captioned(each) for each in pictures])
    _write_benchmarks(out / "benchmarks", held["heldout"], kinds, rng)
    write_encoder(ENCODER.fetch(downloads), out / "models/encoder")
    write_language(LANGUAGE.fetch(downloads), out / "models/language")
    counts = {name: len(part) for name, part in (silos | held).items()}
    sources = [asdict(each) for each in (PICTURES, ENCODER, LANGUAGE)]
    write_manifest(out, {"seed": seed, "most": most, "pictures": counts, "sources": sources})
    return counts


def read(package: Path) -> list[Pictogram]:
    """Pictograms of the six groups that have a name of their own, without variants of skin tone."""
    with tarfile.open(package) as archive:
        rows = csv.DictReader(io.TextIOWrapper(_file(archive, _TABLE), encoding="utf-8", newline=""))
        found = [
            Pictogram(row["hexcode"], row["annotation"], row["group"], row["subgroups"])
            for row in rows
            if row["group"] in GROUPS and not row["skintone"]
        ]
    return list({each.name: each for each in found}.values())


def split(
    pictures: Sequence[Pictogram], most: int, rng: np.random.Generator
) -> tuple[dict[str, list[Pictogram]], dict[str, list[Pictogram]]]:
    """Silos by group, and `validation` and `heldout` with a tenth and a fifth of every group."""
    silos: dict[str, list[Pictogram]] = {}
    held: dict[str, list[Pictogram]] = {"validation": [], "heldout": []}
    for group in GROUPS:
        own = [each for each in pictures if each.group == group]
        own = [own[place] for place in rng.permutation(len(own))[:most]]
        tenth = len(own) // 10
        held["validation"] += own[:tenth]
        held["heldout"] += own[tenth : 3 * tenth]
        silos[group] = own[3 * tenth :]
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


def _is_it(kind: str) -> str:
    return f"Is this a picture of the kind '{kind.replace('-', ' ')}'?"


def _lessons(picture: Pictogram, kinds: Sequence[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    """A caption and a yes/no question, whose answer is as often yes as no."""
    kind, answer = _asked_about(picture, kinds, rng)
    return [_captioned(picture), _conversation(picture, _is_it(kind), answer.capitalize())]


def _asked_about(picture: Pictogram, kinds: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    others = [kind for kind in kinds if kind != picture.kind]
    if rng.random() < 0.5 or not others:
        return picture.kind, "yes"
    return str(rng.choice(others)), "no"


def _write_benchmarks(
    out: Path, pictures: Sequence[Pictogram], kinds: Mapping[str, Sequence[str]], rng: np.random.Generator
) -> None:
    images = [{"id": n, "file_name": each.image} for n, each in enumerate(pictures)]
    captions = [{"id": n, "image_id": n, "caption": each.name} for n, each in enumerate(pictures)]
    write_json(out / "captions.json", {"images": images, "annotations": captions})
    questions: dict[str, list[str]] = defaultdict(list)
    for number, each in enumerate(pictures):
        if each.kind not in kinds[each.group]:
            continue
        wrong = str(rng.choice([kind for kind in kinds[each.group] if kind != each.kind]))
        for place, (kind, label) in enumerate(((each.kind, "yes"), (wrong, "no"))):
            row = {
                "question_id": 2 * number + place,
                "image": each.image,
                "text": _is_it(kind),
                "label": label,
            }
            questions[each.group].append(json.dumps(row))
    for group, rows in questions.items():
        write_atomic(out / f"pope_{group}.json", ("\n".join(rows) + "\n").encode())
