"""The file of one projector's answers: append-only, keyed by question, resumable, for all benchmarks.

A file is of one projector and LLM: its first line says which, and its name has the hash of that. Each
further line has the hash of everything else that decides the answer (picture, prompt, template, length,
options), so one changed question is asked anew alone, and nothing stale is scored.

Several processes write a part each beside it, whose lines also have the number of their batch; the parts are
read with the file, and moved into it in the order of the batches.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcmp.evaluate.benchmarks.base import Answer, Mode
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.hashes import canonical, fingerprint

BATCH = "batch"


def answers_path(folder: Path, projector: str, model: dict[str, Any]) -> Path:
    """Where answers are kept.

    Args:
        folder: The run's scores.
        projector: The projector's file within the run.
        model: What gives the answers: projector content and LLM.
    """
    stem = projector.removesuffix(".safetensors").replace("/", "-")
    return folder / "answers" / f"{stem}.{fingerprint(model)[:12]}.jsonl"


@dataclass(frozen=True)
class Saved:
    """What a file of answers holds.

    Attributes:
        answers: By the question's key.
        failures: Why a question could not be answered, by its key.
        unreadable: Lines that are no answer; their questions are asked again.
    """

    answers: dict[str, Answer]
    failures: dict[str, str]
    unreadable: int

    def knows(self, key: str, mode: Mode) -> bool:
        """Whether a question needs no answer any more."""
        return key in self.failures or (key in self.answers and _has_form(self.answers[key], mode))


def _has_form(answer: Answer, mode: Mode) -> bool:
    if mode in ("generate", "rank"):
        return isinstance(answer, str)
    return isinstance(answer, list) and len(answer) >= 2 and (mode != "likelihood" or len(answer) == 2)


def read_answers(path: Path, model: dict[str, Any]) -> Saved:
    """Saved answers; a line that a killed process left unfinished does not count.

    Raises:
        UserError: The file is of another model.
    """
    saved, unreadable = Saved({}, {}, 0), 0
    for file in (path, *_parts(path)):
        for line in _lines(file, model):
            entry = _entry(line)
            if entry is None:
                unreadable += 1
            elif "failed" in entry:
                saved.failures[entry["key"]] = str(entry["failed"])
            else:
                saved.answers[entry["key"]] = entry["answer"]
    return replace(saved, unreadable=unreadable)


def part_path(path: Path, rank: int) -> Path:
    """Where one of several processes writes its answers."""
    return path.with_name(f"{path.name}.part{rank}")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.part*"))


def _lines(path: Path, model: dict[str, Any]) -> list[bytes]:
    """Whole lines after the first, which must be of the model."""
    if not path.is_file():
        return []
    first, *lines = path.read_bytes().split(b"\n")
    if first != canonical({"model": model}):
        raise UserError(f"{path}: answers of another projector or LLM than its name says; remove it")
    return lines[:-1]


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None where it is no answer."""
    try:
        entry = json.loads(line)
        found = {**entry, "key": str(entry["key"])}
        return found if "failed" in entry else found | {"answer": _answer(entry["answer"])}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _answer(value: Any) -> Answer:
    if isinstance(value, list) and all(isinstance(each, float) and math.isfinite(each) for each in value):
        return value
    if isinstance(value, str):
        return value
    raise TypeError


def begin_answers(path: Path, model: dict[str, Any]) -> None:
    """Make a file ready to append to: its model on the first line, no unfinished last line, no parts."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [canonical({"model": model}), b""]
    if lines[-1] or not path.is_file():
        write_atomic(path, b"\n".join([*lines[:-1], b""]))
    join_parts(path, model)


def join_parts(path: Path, model: dict[str, Any]) -> None:
    """Append what the parts say, batch by batch, and remove them.

    Raises:
        UserError: A part is of another model.
    """
    parts = _parts(path)
    entries = [entry for part in parts for line in _lines(part, model) if (entry := _entry(line))]
    known = set(_lines(path, model))
    with path.open("ab") as file:
        for entry in sorted(entries, key=lambda entry: entry.pop(BATCH)):
            line = canonical(entry)
            if line not in known:  # it is where a kill came before the parts were removed
                file.write(line + b"\n")
                known.add(line)
        file.flush()
        os.fsync(file.fileno())
    for part in parts:
        part.unlink()
