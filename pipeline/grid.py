"""The ablation file: strategies x scenarios x seeds, expanded into ordinary experiments.

name = "methods"
seeds = [0, 1, 2]
scenarios = { content = "configs/scenarios/content.toml" }

[tuning]
seeds = [100]

[strategies.fedavgm]
momentum = [0.3, 0.9]     # a list is a grid to choose from on the tuning seeds
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.config import Experiment, Name, Options, load, validate
from pipeline.errors import UserError, did_you_mean
from pipeline.manifest import fingerprint, read_json

Measure = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+: .+$")]


class Tuning(Options):
    """How options are chosen: the lowest mean of `measure` over seeds that results never use."""

    seeds: tuple[int, ...] = Field(min_length=1)
    measure: Measure = "validation: loss"


class Ablation(Options):
    """An ablation file.

    Measures are written `benchmark: metric`; the first one is tested, lower being better, the others
    are shown. Differences are taken to `baseline`, and from `subject` to every other strategy.
    `set` holds overrides of every run, as `--set` takes them.
    """

    name: Name
    title: str = ""
    seeds: tuple[int, ...] = Field(min_length=2)
    measures: tuple[Measure, ...] = ("loss: loss",)
    baseline: Name = "fedavg"
    subject: Name = "fedcmp"
    scenarios: dict[Name, Path] = Field(min_length=1)
    strategies: dict[Name, dict[str, Any]] = Field(min_length=1)
    tuning: Tuning | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One run of an ablation; `options` are those of its strategy that are not defaults."""

    scenario: str
    strategy: str
    seed: int
    options: tuple[tuple[str, Any], ...]
    experiment: Experiment

    def score(self, measure: str) -> float:
        """A score of the finished run.

        Raises:
            UserError: The benchmark has no such metric.
        """
        benchmark, metric = measure.split(": ", 1)
        metrics = read_json(self.experiment.scores_path / f"{benchmark}.json")["metrics"]
        if metric not in metrics:
            hint = did_you_mean(metric, metrics)
            raise UserError(f"measure '{measure}': benchmark '{benchmark}' has no such metric{hint}")
        return float(metrics[metric]["value"])


def read_ablation(path: Path) -> Ablation:
    """Read an ablation file.

    Raises:
        UserError: It is missing or malformed, or names things that are not there.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of an ablation file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    ablation = validate(Ablation, tables, "", str(path))
    for role in ("baseline", "subject"):
        name = getattr(ablation, role)
        if name not in ablation.strategies:
            hint = did_you_mean(name, ablation.strategies)
            raise UserError(f"{path}: {role} = '{name}': no such strategy{hint}")
    gridded = [name for name in ablation.strategies if len(list(grid(ablation, name))) > 1]
    if gridded and ablation.tuning is None:
        raise UserError(f"{path}: strategies.{gridded[0]} has a list to choose from; add a table [tuning]")
    if ablation.tuning and set(ablation.tuning.seeds) & set(ablation.seeds):
        raise UserError(f"{path}: tuning.seeds and seeds overlap; tune on seeds that results never use")
    return ablation


def grid(ablation: Ablation, strategy: str) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Every combination of a strategy's options."""
    options = ablation.strategies[strategy]
    choices = [value if isinstance(value, list) else [value] for value in options.values()]
    for values in product(*choices):
        yield tuple(zip(options, values, strict=True))


def trial(
    ablation: Ablation, scenario: str, strategy: str, seed: int, options: tuple[tuple[str, Any], ...]
) -> Trial:
    """The run of one strategy on one scenario with one seed."""
    component = {"name": strategy} | dict(options)
    own = {name: value for name, value in component.items() if name != "name"}
    run = f"{strategy}-{fingerprint(own)[:8]}" if own else strategy
    overrides = [f"seed={seed}", *ablation.set, f"run={run}"]
    overrides += [f"federate.strategy.{name}={json.dumps(value)}" for name, value in component.items()]
    return Trial(scenario, strategy, seed, options, load(ablation.scenarios[scenario], overrides))
