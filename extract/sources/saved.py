"""Folders of tables: Parquet as on Hugging Face's hub, or what `datasets` has saved."""

from __future__ import annotations

import glob
import json
import re
from collections import defaultdict
from pathlib import Path

from fedcmp.extract.sources import Location, Remote, UserError
from fedcmp.extract.sources.shards import shards_of
from fedcmp.pipeline.remote import is_url

_NUMBERED = re.compile(r"(.*?)-([0-9]{5})-of-([0-9]{5})\.parquet")


def tables_of(path: str) -> list[Location]:
    """Files of a path: those of a folder, or what `shards_of` finds.

    Raises:
        UserError: There is none, or a folder holds several splits or not all files of one.
    """
    place: Location = Remote(path) if is_url(path) else Path(path)
    names = None if glob.has_magic(path) or "{" in path else _inside(place)
    if names is None:
        return list(shards_of(path))
    if "state.json" in names:
        return [place / name for name in _data_files(place / "state.json")]
    if "dataset_dict.json" in names:
        one = place / _split(place)
        raise UserError(f"{place}: it holds several splits; set 'path' to one of them, such as '{one}'")
    tables = sorted(name for name in names if name.endswith(".parquet"))
    if not tables:
        raise UserError(f"{place}: no .parquet file in it, nor a data set saved by 'datasets'")
    _require_one_split(place, tables)
    return [place / name for name in tables]


def _split(place: Location) -> str:
    """The name of the first split, as the file beside says."""
    try:
        return str(json.loads((place / "dataset_dict.json").read_bytes())["splits"][0])
    except (ValueError, TypeError, LookupError, RecursionError):
        return "train"


def _inside(place: Location) -> list[str] | None:
    """Names of files in a folder; None where it is a file or absent."""
    if isinstance(place, Remote):
        found = {} if place.is_file() else place.listing()
        return [name for name in found if "/" not in name] if found else None
    return [file.name for file in place.iterdir() if file.is_file()] if place.is_dir() else None


def _data_files(state: Location) -> list[str]:
    """The files that a saved data set is made of, in its order.

    Raises:
        UserError: Its list of them is damaged.
    """
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        if not names or not all(re.fullmatch(r"[^/\\]+\.arrow", name) for name in names):
            raise ValueError("it names no .arrow files beside it")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{state}: not as 'datasets' writes it ({error}); save the data set again") from None
    return names


def _require_one_split(place: Location, tables: list[str]) -> None:
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for match in filter(None, map(_NUMBERED.fullmatch, tables)):
        numbers[match[1], match[3]].add(int(match[2]))
    if len(numbers) > 1:
        splits = ", ".join(split for split, _ in numbers)
        first = next(iter(numbers))[0]
        raise UserError(
            f"{place}: it holds {splits}; set 'path' to one of them, as '{place}/{first}-*.parquet'"
        )
    for (split, total), there in numbers.items():
        if there != set(range(int(total))):
            raise UserError(
                f"{place}: {len(there)} of {int(total)} files {split}-*-of-{total}.parquet are there; fetch "
                f"the others, or set 'path' to '{place}/{split}-*.parquet' to take these"
            )
