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

from fedcmp.pipeline import plugins, toml
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.options import Component, Options


def load(path: Path, overrides: Sequence[str] = (), *stages: str) -> Experiment:
    """Read an experiment file and build its components, of all stages or of some; see `pipeline.toml.load`.

    Raises:
        UserError: The file is missing or malformed, or a key, name or value is wrong, in whichever stage.
    """
    return built(toml.load(path, overrides), *stages)


def built(experiment: Experiment, *stages: str) -> Experiment:
    """An experiment whose components know what they were built with; those of `federate` import torch.

    Raises:
        UserError: A name is unknown, or an option is unknown or wrong.
    """
    files = tuple(plugins.read(each) for each in experiment.plugins)
    for where, component in components(experiment):
        component.note_plugins(files)
        if stages and where.split(".")[0] not in stages:
            continue
        component.note_built(build(where, component), _registry(where).provenance(component, where))
    return experiment


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


def components(experiment: Experiment) -> Iterator[tuple[str, Component]]:
    """Every component with its place, such as `extract.silos.clinic`."""
    yield "extract.encoder", experiment.extract.encoder
    for name, source in experiment.extract.silos.items():
        yield f"extract.silos.{name}", source
    for name, benchmark in experiment.evaluate.benchmarks.items():
        yield f"evaluate.benchmarks.{name}", benchmark
    yield "federate.projector", experiment.federate.projector
    yield "federate.strategy", experiment.federate.strategy
    if experiment.align is not None:
        yield "align.reward", experiment.align.reward
        for name, reward in experiment.align.rewards.items():
            yield f"align.rewards.{name}", reward
        yield "align.router", experiment.align.router


def _registry(where: str) -> Any:
    """The registry for a place; those of stage two import torch, so each is imported when it is needed."""
    stage, kind, *_ = where.split(".")
    match stage, kind:
        case "extract", "encoder":
            from fedcmp.extract.encoders.base import ENCODERS

            return ENCODERS
        case "extract", "silos":
            from fedcmp.extract.sources.base import SOURCES

            return SOURCES
        case "evaluate", "benchmarks":
            from fedcmp.evaluate.benchmarks.base import BENCHMARKS

            return BENCHMARKS
        case "federate", "projector":
            from fedcmp.pipeline.models.projectors.base import PROJECTORS

            return PROJECTORS
        case "federate", "strategy":
            from fedcmp.federate.strategies.base import STRATEGIES

            return STRATEGIES
        case "align", "reward" | "rewards":
            from fedcmp.federate.preference.rewards import REWARDS

            return REWARDS
        case "align", "router":
            from fedcmp.federate.preference.routers import ROUTERS

            return ROUTERS
    raise KeyError(where)
