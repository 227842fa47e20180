"""The file of one projector's answers: append-only, keyed by question, resumable, for all benchmarks.

A file is of one projector and LLM: its first line says which, and its name has the hash of that. Each
further line has the hash of everything else that decides the answer (picture, prompt, template, length,
options), so one changed question is asked anew alone, and nothing stale is scored.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcmp.evaluate.benchmarks.base import Answer, Mode
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.hashes import canonical, fingerprint


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
    saved = Saved({}, {}, 0)
    if not path.is_file():
        return saved
    first, *lines = path.read_bytes().split(b"\n")
    if first != canonical({"model": model}):
        raise UserError(f"{path}: answers of another projector or LLM than its name says; remove it")
    unreadable = 0
    for line in lines[:-1]:
        try:
            entry = json.loads(line)
            key = str(entry["key"])
            if "failed" in entry:
                saved.failures[key] = str(entry["failed"])
            else:
                saved.answers[key] = _answer(entry["answer"])
        except (ValueError, TypeError, KeyError, RecursionError):
            unreadable += 1
    return replace(saved, unreadable=unreadable)


def _answer(value: Any) -> Answer:
    if isinstance(value, list) and all(isinstance(each, float) and math.isfinite(each) for each in value):
        return value
    if isinstance(value, str):
        return value
    raise TypeError


def begin_answers(path: Path, model: dict[str, Any]) -> None:
    """Make a file ready to append to: its model on the first line, no unfinished last line."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [canonical({"model": model}), b""]
    if lines[-1] or not path.is_file():
        write_atomic(path, b"\n".join([*lines[:-1], b""]))
