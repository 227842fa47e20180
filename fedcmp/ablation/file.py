"""The ablation file: strategies x scenarios x seeds, expanded into ordinary experiments.

name = "methods"
seeds = [0, 1, 2]
scenarios = { content = "configs/scenarios/content.toml" }

[tuning]
seeds = [100]

[strategies.fedavgm]
momentum = [0.3, 0.9]     # a list is a grid to choose from on the tuning seeds
"optimizer.learning_rate" = [1e-3, 3e-3]    # of the clients' optimiser
"projector.name" = "linear"                  # and what else of [federate] is not the strategy's
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import Field

from fedcmp.components import built
from fedcmp.pipeline import plugins, toml
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.options import Name, Options, validate
from fedcmp.pipeline.plugins import Plugin
from fedcmp.pipeline.toml import read_toml

# Where things lie and how fast they are made changes no result, so such runs may share a directory.
_WITHOUT_EFFECT = ("memo.", "build=", "features=", "device=", "evaluate.", "plugins=", "tracker=")

# Options of these tables of [federate] may stand among a strategy's.
_OF_FEDERATE = ("optimizer.", "adapter.", "projector.")
_TABLES = (*_OF_FEDERATE, "align.")

Chosen = tuple[tuple[str, Any], ...]
MEASURE = r"^[A-Za-z0-9._-]+: .+$"
Measure = Annotated[str, Field(pattern=MEASURE)]
Better = Literal["lower", "higher"]


class Tuning(Options):
    """How options are chosen: the best mean of `measure` over seeds that results never use.

    All combinations are tried on the first `screened` seeds, and the better quarter of them on the rest
    (successive halving); on all seeds without it.

    Where the best value is at the edge of its grid, a better one may lie beyond: such a strategy was not
    tuned, which is an error unless `edges` are only to be reported. With `edges = "extend"` the next number
    beyond is tried on all seeds, again and again until it is no better, up to eight times. `better` is that
    of the results by default.
    """

    seeds: tuple[int, ...] = Field(min_length=1)
    measure: str = "validation: loss"
    better: Better | None = None
    screened: int | None = Field(None, ge=1)
    edges: Literal["error", "extend", "report"] = "error"


class Contest(Options):
    """Comparisons that were decided on before any result was seen: `subject` against each of `rivals`.

    Ratios of the first measure, paired by seed: averaged over scenarios for the primary comparisons, and in
    every scenario for the secondary ones.
    """

    rivals: tuple[Name, ...] = Field(min_length=1)


class Ablation(Options):
    """An ablation file.

    Measures are written `benchmark: metric`, or named in `means`, as the mean of several; the first one is
    tested, the others are shown. Differences
    are taken to `baseline`, and from `subject` to every other strategy; `bounds` are shown, but are
    nobody's rivals. `set` holds overrides of every run, as `--set` takes them, and `plugins` the files of
    strategies that are not ours.
    """

    name: Name
    title: str = ""
    seeds: tuple[int, ...] = Field(min_length=2)
    measures: tuple[str, ...] = Field(("loss: loss",), min_length=1)
    means: dict[str, tuple[Measure, ...]] = Field(default_factory=dict)
    better: Better = "lower"
    baseline: Name = "fedavg"
    subject: Name = "fedcmp"
    bounds: tuple[Name, ...] = ()
    scenarios: dict[Name, Path] = Field(min_length=1)
    strategies: dict[Name, dict[str, Any]] = Field(min_length=1)
    tuning: Tuning | None = None
    contest: Contest | None = None
    set: tuple[str, ...] = ()
    plugins: tuple[Path, ...] = ()

    @property
    def sign(self) -> int:
        """1 where lower is better, -1 where higher is."""
        return 1 if self.better == "lower" else -1

    @property
    def tuning_sign(self) -> int:
        """The same of what options are chosen by."""
        better = self.better if self.tuning is None else self.tuning.better or self.better
        return 1 if better == "lower" else -1

    def parts(self, measure: str) -> tuple[str, ...]:
        """The measures, as `benchmark: metric`, that one is the mean of."""
        return self.means.get(measure, (measure,))

    def benchmarks(self, measures: Sequence[str]) -> tuple[str, ...]:
        """The benchmarks that some measures are of."""
        parts = (part for measure in measures for part in self.parts(measure))
        return tuple(dict.fromkeys(part.split(": ", 1)[0] for part in parts))


@dataclass(frozen=True)
class Trial:
    """One run of an ablation; `options` are those of its strategy that are not defaults."""

    scenario: str
    strategy: str
    seed: int
    options: Chosen
    experiment: Experiment

    def score(self, *measures: str) -> float:
        """The mean of some scores of the finished run, as `benchmark: metric`.

        Raises:
            UserError: The benchmark has no such metric.
        """
        values = []
        for measure in measures:
            benchmark, metric = measure.split(": ", 1)
            metrics = read_json(self.experiment.scores_path / f"{benchmark}.json")["metrics"]
            if metric not in metrics:
                hint = did_you_mean(metric, metrics)
                raise UserError(f"measure '{measure}': benchmark '{benchmark}' has no such metric{hint}")
            values.append(float(metrics[metric]["value"]))
        return fmean(values)


def read_ablation(path: Path) -> Ablation:
    """Read an ablation file.

    Raises:
        UserError: It is missing or malformed, or names things that are not there.
    """
    ablation = validate(Ablation, toml.located(read_toml(path), path.parent), "", str(path))
    for problem in _problems(ablation):
        raise UserError(f"{path}: {problem}")
    return ablation


def _problems(ablation: Ablation) -> Iterator[str]:
    """What is wrong with an ablation although every value by itself is right."""
    known, tuning = ablation.strategies, ablation.tuning
    for role, name in (
        ("baseline", ablation.baseline),
        ("subject", ablation.subject),
        *(("bounds", bound) for bound in ablation.bounds),
        *(("contest.rivals", rival) for rival in (ablation.contest.rivals if ablation.contest else ())),
    ):
        if name not in known:
            yield f"{role} = '{name}': no such strategy{did_you_mean(name, known)}"
    for strategy, options in known.items():
        for name, value in options.items():
            if isinstance(value, list) and (not value or len(set(map(str, value))) < len(value)):
                yield f"strategies.{strategy}.{name} = {value}: give different values"
        if ablation.tuning is None and len(list(grid(ablation, strategy))) > 1:
            yield f"strategies.{strategy} has a list to choose from; add a table [tuning]"
    if ablation.contest is not None and ablation.better == "higher":
        yield "contest: compares ratios of losses; better = 'higher' does not fit, so remove one of the two"
    if ablation.tuning is not None and (ablation.tuning.screened or 0) > len(ablation.tuning.seeds):
        yield f"tuning.screened = {ablation.tuning.screened}: there are {len(ablation.tuning.seeds)} seeds"
    seeds = [*ablation.seeds, *(ablation.tuning.seeds if ablation.tuning else ())]
    if len(set(seeds)) < len(seeds):
        yield "a seed is named twice; tune on seeds that results never use"
    for override in ablation.set:
        if re.match(r"(seed|run|experiment|federate\.strategy)\b", override):
            yield f"set = '{override}': the ablation itself decides this; remove it"
    measured = [("measures", measure, ablation.sign) for measure in ablation.measures]
    measured += [] if tuning is None else [("tuning.measure", tuning.measure, ablation.tuning_sign)]
    for key, measure, sign in measured:
        for part in ablation.parts(measure):
            if not re.match(MEASURE, part):
                yield f"{key}: '{part}': expected 'benchmark: metric', or a name of [means]"
            elif part.endswith(": loss") and sign < 0:
                yield f"{key}: '{part}': of losses the lower is better; say better = 'lower'"
    same = [*ablation.set, "seed=0", "run=one"]
    runs = {toml.load(path, same).run_path for path in ablation.scenarios.values()}
    if len(runs) < len(ablation.scenarios):
        yield "two scenarios have the same 'experiment'; name them differently"


def experiments(ablation: Ablation) -> list[str]:
    """Every experiment of the ablation, tuning included: a scenario with a seed."""
    seeds = [*ablation.seeds, *(ablation.tuning.seeds if ablation.tuning else ())]
    return [
        toml.load(scenario, [f"seed={seed}"]).experiment
        for scenario in ablation.scenarios.values()
        for seed in seeds
    ]


def plugins_of(ablation: Ablation, scenario: str) -> tuple[Plugin, ...]:
    """The plugin files that a scenario's strategies may come from."""
    files = toml.load(ablation.scenarios[scenario], _common(ablation)).plugins
    return tuple(plugins.read(each) for each in files)


def _common(ablation: Ablation) -> list[str]:
    """Overrides of every run."""
    named = [str(each) for each in ablation.plugins]
    return [*ablation.set, *([f"plugins={json.dumps(named)}"] if named else [])]


def grid(ablation: Ablation, strategy: str) -> Iterator[Chosen]:
    """Every combination of a strategy's options."""
    options = ablation.strategies[strategy]
    choices = [value if isinstance(value, list) else [value] for value in options.values()]
    for values in product(*choices):
        yield tuple(zip(options, values, strict=True))


def component(strategy: str, options: Chosen) -> dict[str, Any]:
    """A strategy with those of its options that are its own."""
    return {"name": strategy} | {name: value for name, value in options if not name.startswith(_TABLES)}


def trial(ablation: Ablation, scenario: str, strategy: str, seed: int, options: Chosen) -> Trial:
    """The run of one strategy on one scenario with one seed."""
    own = component(strategy, options)
    written = {name: value for name, value in options if name != "name"}
    changes = [override for override in ablation.set if not override.startswith(_WITHOUT_EFFECT)]
    decides = [fingerprint([written, changes] if changes else written)[:8]] if written or changes else []
    parts = [strategy, *decides]
    run = "-".join([*parts, f"seed{seed}"])
    overrides = [f"seed={seed}", *_common(ablation), f"run={run}"]
    tables = [toml.nested(f"federate.strategy.{name}", value) for name, value in own.items()]
    for name, value in options:
        if name.startswith(_TABLES):
            place = f"federate.{name}" if name.startswith(_OF_FEDERATE) else name
            tables.append(toml.nested(place, value))
    experiment = built(toml.load(ablation.scenarios[scenario], overrides, changes=tables))
    return Trial(scenario, strategy, seed, options, experiment)
