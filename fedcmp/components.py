"""The named components of an experiment, built from their options by the registries of the stages.

They are built before anything else is done, so that a mistake in any of them costs no picture and no
round. What was built, not what was written, decides a run: a default may be written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from fedcmp.cli import REGISTRIES, imported
from fedcmp.pipeline import config
from fedcmp.pipeline.config import Component, Experiment, Options


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file of which every component can be built; see `pipeline.config.load`.

    Raises:
        UserError: The file is missing or malformed, or a key, name or value is wrong, in whichever stage.
    """
    experiment = config.load(path, overrides)
    check(experiment)
    return experiment


def check(experiment: Experiment, *stages: str) -> None:
    """Build every component of some stages, or of all; those of `federate` alone import torch.

    Raises:
        UserError: A name is unknown, or an option is unknown or wrong.
    """
    for where, component in components(experiment):
        if not stages or where.split(".")[0] in stages:
            build(where, component)


def build(where: str, component: Component) -> Options:
    """A component from its place in the configuration, such as `federate.strategy`.

    Raises:
        UserError: The name is unknown, or an option is unknown or wrong.
    """
    built: Options = _registry(where).build(component, where)
    return built


def written_out(experiment: Experiment) -> dict[str, Any]:
    """The tables of an experiment's file with every default, those of its components too."""
    tables = experiment.model_dump(mode="json", exclude_none=True)
    for where, component in components(experiment):
        *place, name = where.split(".", 2)
        table = reduce(getitem, place, tables)
        table[name] = _registry(where).written_out(component, where)
    return tables


def as_built(where: str, component: Component) -> dict[str, Any]:
    """JSON value of a component with all of its options, its defaults included."""
    return {"name": component.name, **build(where, component).model_dump(mode="json")}


def _registry(where: str) -> Any:
    return imported(
        next(target for place, target in REGISTRIES.items() if f"{where}.".startswith(f"{place}."))
    )


def components(experiment: Experiment) -> Iterator[tuple[str, Component]]:
    """Every component with its place, such as `extract.silos.clinic`."""
    yield "extract.encoder", experiment.extract.encoder
    for name, source in experiment.extract.silos.items():
        yield f"extract.silos.{name}", source
    for name, benchmark in experiment.evaluate.benchmarks.items():
        yield f"evaluate.benchmarks.{name}", benchmark
    yield "federate.projector", experiment.federate.projector
    yield "federate.strategy", experiment.federate.strategy
