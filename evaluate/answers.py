"""The file of one projector's answers to one benchmark: append-only, keyed, resumable.

Its name carries the hash of its key, so answers of another projector, prompt or LLM lie in another
file: nothing stale is scored, and nothing that was answered is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluate.benchmarks.base import Answer
from pipeline.manifest import canonical, fingerprint, write_atomic


def answers_path(folder: Path, benchmark: str, projector: str, key: dict[str, Any]) -> Path:
    """Where answers are kept.

    Args:
        folder: The run's scores.
        benchmark: Its name.
        projector: The projector's file within the run.
        key: What the answers depend on: projector content, prompts, features, LLM.
    """
    stem = projector.removesuffix(".safetensors").replace("/", "-")
    return folder / "answers" / f"{benchmark}.{stem}.{fingerprint(key)[:12]}.jsonl"


@dataclass(frozen=True)
class Saved:
    """What a file of answers holds.

    Attributes:
        answers: By item id.
        failures: Why an item could not be answered, by its id.
        unreadable: Lines that are no answer; their items are answered again.
    """

    answers: dict[str, Answer]
    failures: dict[str, str]
    unreadable: int

    def knows(self, item: str) -> bool:
        """Whether an item needs no answer any more."""
        return item in self.answers or item in self.failures


def read_answers(path: Path) -> Saved:
    """Saved answers; a line that a killed process left unfinished does not count."""
    saved = Saved({}, {}, 0)
    unreadable = 0
    for line in path.read_bytes().split(b"\n")[1:-1] if path.is_file() else []:
        try:
            entry = json.loads(line)
            if "failed" in entry:
                saved.failures[entry["id"]] = entry["failed"]
                continue
            answer = entry["answer"]
            if not isinstance(answer, str) and not all(isinstance(number, float) for number in answer):
                raise TypeError
            saved.answers[entry["id"]] = answer
        except (ValueError, TypeError, KeyError, RecursionError):
            unreadable += 1
    return replace(saved, unreadable=unreadable)


def begin_answers(path: Path, key: dict[str, Any]) -> None:
    """Make a file ready to append to: its key on the first line, no unfinished last line."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [canonical({"key": key}), b""]
    if lines[-1] or not path.is_file():
        write_atomic(path, b"\n".join([*lines[:-1], b""]))
