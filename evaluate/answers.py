"""The file of one projector's answers to one benchmark: append-only, keyed, resumable.

Its name carries the hash of its key, so answers of another projector, prompt or LLM lie in another
file: nothing stale is scored, and nothing that was answered is lost.
"""

from __future__ import annotations

import json
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


def read_answers(path: Path) -> dict[str, Answer]:
    """Saved answers by item id; a line that a killed process left unfinished does not count."""
    if not path.is_file():
        return {}
    entries = [json.loads(line) for line in path.read_bytes().split(b"\n")[1:-1]]
    return {entry["id"]: entry["answer"] for entry in entries}


def begin_answers(path: Path, key: dict[str, Any]) -> None:
    """Make a file ready to append to: its key on the first line, no unfinished last line."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [canonical({"key": key}), b""]
    if lines[-1] or not path.is_file():
        write_atomic(path, b"\n".join([*lines[:-1], b""]))
