"""What is merged: projectors that fit each other, their base, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedcmp.federate.arithmetic.updates import State, Update, check
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.plugins import Plugin
from fedcmp.pipeline.run_folder import place_of, projector_file, read_history


@dataclass(frozen=True)
class Source:
    """One projector to merge; `samples` is what its history says, if there is one."""

    name: str
    path: Path
    architecture: str
    state: State
    samples: int | None


@dataclass(frozen=True)
class Inputs:
    """All that a method is given, and where it came from.

    `weighted_by` says where the updates' samples come from, `guided` what their alignments do.
    """

    sources: list[Source]
    base: State
    base_path: Path | None
    updates: list[Update]
    weighted_by: str
    guided: dict[str, Any] | None = None


def read_inputs(
    paths: Sequence[Path], base: Path | None, weights: str | None, plugins: tuple[Plugin, ...] = ()
) -> Inputs:
    """Read what is to be merged, and refuse what cannot be."""
    sources = _sources(paths, plugins)
    start, base_path = _base(base, sources[0], plugins)
    counts, weighted_by = _counts(sources, weights)
    updates = []
    for source, count in zip(sources, counts, strict=True):
        updates.append(Update(source.name, source.state, count))
        try:
            check(start, updates[-1:])
        except ValueError as error:
            raise UserError(f"{source.path}: cannot be merged: {error}; train it again") from None
    say(
        f"Base: {base_path}"
        if base_path
        else "Base: zero, so updates are the weights themselves; --base gives what they were trained from"
    )
    say(f"Weights: {weighted_by}")
    return Inputs(sources, start, base_path, updates, weighted_by)


def _sources(paths: Sequence[Path], plugins: tuple[Plugin, ...]) -> list[Source]:
    """Read projectors that fit each other, named by file or run, and by content where that is not enough."""
    files = [projector_file(path) for path in paths]
    for number, file in enumerate(files):
        if file.resolve() in {earlier.resolve() for earlier in files[:number]}:
            raise UserError(f"{file}: is given twice; weight it with --weights instead")
    read = [_read(file, plugins) for file in files]
    names = [file.resolve().parent.name if file.stem == "projector" else file.stem for file in files]
    if len(set(names)) < len(names):
        hashes = [projectors.content_hash(state)[:8] for _, state in read]
        named = [f"{name}-{content}" for name, content in zip(names, hashes, strict=True)]
        names = [f"{name}-{named[:place].count(name)}" for place, name in enumerate(named)]
    sources = [
        Source(name, file, architecture, state, _samples(file))
        for name, file, (architecture, state) in zip(names, files, read, strict=True)
    ]
    for source in sources[1:]:
        _refuse_another_form(source.path, source.architecture, source.state, sources[0])
    return sources


def _read(path: Path, plugins: tuple[Plugin, ...]) -> tuple[str, State]:
    """Architecture and float32 weights of a projector file."""
    projectors.refuse_tuned(path)
    module, state = projectors.load_projector(path, plugins)
    return module.architecture, {name: tensor.float() for name, tensor in state.items()}


def _refuse_another_form(path: Path, architecture: str, state: State, first: Source) -> None:
    if architecture != first.architecture:
        raise UserError(
            f"{path}: architecture {architecture}, but {first.path} is {first.architecture}; "
            "only projectors of one architecture can be merged"
        )
    for name, tensor in state.items():
        expected = first.state[name]
        if tensor.shape != expected.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but {tuple(expected.shape)} in "
                f"{first.path}; only projectors of one encoder and one LLM can be merged"
            )


def _base(path: Path | None, first: Source, plugins: tuple[Plugin, ...]) -> tuple[State, Path | None]:
    """The projector that updates are counted from, and its file."""
    if path is None:
        return {name: torch.zeros_like(tensor) for name, tensor in first.state.items()}, None
    file = projector_file(path)
    architecture, state = _read(file, plugins)
    _refuse_another_form(file, architecture, state, first)
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{file}: cannot be the base: values that are not finite in {name}")
    return {name: state[name] for name in first.state}, file


def _samples(path: Path) -> int | None:
    """Samples a projector was trained on, by the history of its run; None where it has none."""
    folder, name = place_of(path.resolve())
    of_silo = name.startswith("silos/")
    if not of_silo and path.stem != "projector":
        return None
    rows = [row for row in read_history(folder) if row.get("client")]
    return sum(row.get("samples", 0) for row in rows if not of_silo or row["client"] == path.stem) or None


def _counts(sources: Sequence[Source], weights: str | None) -> tuple[list[int], str]:
    """Samples of every source, and in words where they come from."""
    if weights is not None:
        return _given_counts(weights, len(sources)), "as given by --weights"
    known = [source.samples for source in sources if source.samples is not None]
    if len(known) == len(sources):
        return known, "samples of the runs' histories"
    lacking = next(source.path for source in sources if source.samples is None)
    return [1] * len(sources), f"1 each, because {lacking} has no history.jsonl beside it"


def _given_counts(weights: str, number: int) -> list[int]:
    try:
        counts = [int(part) for part in weights.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--weights {weights}: expected whole numbers above 0 with commas, e.g. 3,5")
    if len(counts) != number:
        raise UserError(
            f"--weights {weights}: number of weights is {len(counts)}, of projectors {number}; give one each"
        )
    return counts
