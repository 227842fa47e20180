"""The file of one projector's answers to one benchmark: append-only, keyed, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluate.benchmarks.base import Answer
from pipeline.manifest import canonical


def open_answers(path: Path, key: dict[str, Any]) -> dict[str, Answer]:
    """Answers saved under the same key; a file of another key is begun anew.

    A line half-written by a killed process is dropped.

    Args:
        path: `answers.jsonl`, whose first line is its key.
        key: What the answers depend on: projector content, prompts, features, LLM.
    """
    answers: dict[str, Answer] = {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    if lines and lines[0] == canonical({"key": key}):
        for line in lines[1:-1]:
            entry = json.loads(line)
            answers[entry["id"]] = entry["answer"]
        if lines[-1]:
            path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
        return answers
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical({"key": key}) + b"\n")
    return answers
