"""What is in a folder of pictures, and what in it is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedcmp.extract.sources import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, Skipped, printable
from fedcmp.pipeline.remote import Location, Remote


@dataclass
class Found:
    """Names relative to a folder.

    Attributes:
        pictures: Of a format that is read, sorted.
        texts: The file beside a picture that holds its text, by the picture's name without suffix.
        skipped: What looks like a picture or a text and is left out, in an order that is always the same.
    """

    pictures: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def look_through(folder: Location) -> Found:
    """Everything in a folder and its subfolders; linked folders are followed, each folder once."""
    found = Found()
    if isinstance(folder, Remote):
        names: Iterable[str] = folder.listing()
    else:
        names = _walk(folder, found.skipped)
    others: Counter[str] = Counter()
    for name in sorted(names):
        stem, dot, suffix = name.rpartition(".")
        kind = suffix.lower() if dot and "/" not in suffix else ""
        if kind in IMAGE_SUFFIXES:
            found.pictures.append(name)
        elif kind == "txt" and (stem not in found.texts or suffix == "txt"):
            found.texts[stem] = name
        elif kind in OTHER_IMAGE_SUFFIXES:
            found.skipped.append(
                Skipped(printable(str(folder / name)), f"the format .{kind} is not read; convert it to .png")
            )
        else:
            others[f".{kind}" if kind else "without suffix"] += 1
    named = {name.rpartition(".")[0] for name in found.pictures}
    found.skipped += [
        Skipped(printable(str(folder / name)), "no picture of this name is beside this text")
        for stem, name in found.texts.items()
        if stem not in named
    ]
    if others:
        kinds = ", ".join(f"{number} {printable(kind)}" for kind, number in sorted(others.items()))
        found.skipped.append(Skipped(str(folder), f"files not looked at, by their suffix: {kinds}"))
    return found


def _walk(folder: Path, skipped: list[Skipped]) -> Iterator[str]:
    """Names of all files, first of the folder's own, then of what links in it lead to."""

    def locked(error: OSError) -> None:
        skipped.append(Skipped(printable(str(error.filename)), f"cannot be entered: {error.strerror}"))

    waiting, trees = [folder], [folder.resolve()]
    while waiting:
        linked: list[Path] = []
        for inside, folders, files in os.walk(waiting.pop(0), onerror=locked):
            folders.sort()
            linked += [Path(inside, name) for name in folders if Path(inside, name).is_symlink()]
            yield from (os.path.relpath(os.path.join(inside, file), folder) for file in files)
        for link in sorted(linked):
            target = link.resolve()
            known = next(
                (tree for tree in trees if target.is_relative_to(tree) or tree.is_relative_to(target)), None
            )
            if known is None:
                trees.append(target)
                waiting.append(link)
            else:
                skipped.append(
                    Skipped(printable(str(link)), f"a link to a folder of which {known} is taken already")
                )
