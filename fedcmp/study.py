"""The stages from Python: what the commands do, with results as objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp import components
from fedcmp.pipeline import toml
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from fedcmp.evaluate.compare import Row
    from fedcmp.evaluate.statistics import Score
    from fedcmp.pipeline.cache import FeatureCache
    from fedcmp.pipeline.run_folder import Run


def load(source: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Study:
    """An experiment, from its file or from tables as such a file has them.

    Args:
        source: Path of a TOML file, or its content as a dict; paths in it are relative to the working
            directory.
        changes: Values by dotted key, such as `{"federate.rounds": 4}`, in place of what is there.

    Raises:
        UserError: The file is missing or malformed, or a key, name or value is wrong.
    """
    over = [toml.nested(key, value) for key, value in (changes or {}).items()]
    if isinstance(source, Mapping):
        experiment = toml.experiment_of({"run": "run"}, [dict(source), *over])
    else:
        experiment = toml.load(Path(source), changes=over)
    return Study(components.built(experiment))


class Study:
    """One run of an experiment: its caches, its training, its scores.

    Every method finds what is done already and does the rest; what it prints is what the command prints.

    Attributes:
        experiment: The configuration, frozen.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def __repr__(self) -> str:
        """Which run it is."""
        return f"Study(experiment={self.experiment.experiment!r}, run={self.experiment.run!r})"

    def extract(self, *silos: str, overwrite: bool = False) -> dict[str, FeatureCache]:
        """Encode the pictures of some silos, or of all.

        Args:
            *silos: Their names.
            overwrite: Encode again what is there in another form.

        Returns:
            Caches by silo; `cache.tensor(rows)` gives features `(rows, patches, d_vision)`.

        Raises:
            UserError: A silo is unknown, its source is unusable, or its cache was made differently.
        """
        from fedcmp.extract.run import run

        outcomes = run(self.experiment, only=silos, overwrite=overwrite)
        return {outcome.path.stem: outcome.cache for outcome in outcomes if outcome.cache is not None}

    def federate(self) -> Run:
        """Train the projector, go on where training was interrupted, or find it done.

        Raises:
            UserError: A cache is missing or of another encoder, or training diverged.
        """
        from fedcmp.federate.run import run

        return run(self.experiment)

    def evaluate(self, *benchmarks: str, limit: int | None = None) -> Scores:
        """Answer some benchmarks, or all, and score the answers.

        Args:
            *benchmarks: Their names.
            limit: Questions of each at most, the first ones; scores of fewer than all say so.

        Raises:
            UserError: The run is not finished, or a benchmark cannot be evaluated.
        """
        from fedcmp.evaluate.run import evaluate_run

        return Scores(evaluate_run(self.experiment, benchmarks, limit))

    def compare(self, *others: Study, benchmarks: Sequence[str] = ()) -> list[Row]:
        """This run against another on the same questions: differences, intervals and p values.

        Args:
            *others: The run it is compared with; further ones are pairs of the same methods with other
                seeds.
            benchmarks: Names; all by default.

        Raises:
            UserError: Runs are no pairs, or answers are missing.
        """
        from fedcmp.evaluate.compare import compare_runs

        return compare_runs([self.experiment, *(each.experiment for each in others)], tuple(benchmarks))

    def report(self, *others: Study, baseline: str | None = None) -> Path:
        """Write this run and others on one page; its directory.

        Args:
            *others: Further runs of the experiment.
            baseline: The run to compare with, by default the first of FedAvg, else the first.

        Raises:
            UserError: They are of several experiments, or none is evaluated.
        """
        from fedcmp.evaluate.report.collect import write_report

        return write_report([self.experiment, *(each.experiment for each in others)], baseline)


class Scores(Mapping[str, "Score"]):
    """A run's scores: `scores["pope: accuracy"].value`, and `.low`, `.high`, `.n`.

    Attributes:
        contents: What stands in each benchmark's file of scores, with counts, settings and warnings.
    """

    def __init__(self, contents: dict[str, dict[str, Any]]) -> None:
        self.contents = contents

    def __getitem__(self, measure: str) -> Score:
        """The score of `benchmark: metric`."""
        from fedcmp.evaluate.statistics import Score

        if measure not in [*self]:
            raise KeyError(f"{measure}{did_you_mean(measure, self)}")
        benchmark, _, metric = measure.partition(": ")
        return Score(**self.contents[benchmark]["metrics"][metric])

    def __iter__(self) -> Iterator[str]:
        """Every `benchmark: metric`."""
        for benchmark, content in self.contents.items():
            yield from (f"{benchmark}: {metric}" for metric in content["metrics"])

    def __len__(self) -> int:
        """How many there are."""
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        """A line a score."""
        return "\n".join(
            f"{name}  {score.value:.3f} ({score.low:.3f} to {score.high:.3f}), n = {score.n}"
            for name, score in self.items()
        )

    def frame(self) -> pd.DataFrame:
        """Columns benchmark, metric, value, low, high, n; 95 % intervals over images."""
        rows = [
            {"benchmark": benchmark, "metric": metric, **values}
            for benchmark, content in self.contents.items()
            for metric, values in content["metrics"].items()
        ]
        return frame(rows)


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a data frame, such as `fedcmp.frame(run.history)`.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise UserError("data frames need pandas; run: pip install pandas") from None
    return pd.DataFrame([dict(row) for row in rows])
