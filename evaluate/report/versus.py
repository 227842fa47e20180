"""Every run against a baseline: paired differences on the same questions."""

from __future__ import annotations

from collections.abc import Sequence

from fedcmp.evaluate.compare import Row, differences_of
from fedcmp.evaluate.report.judged import Judged
from fedcmp.evaluate.report.results import Column, Comparison, Verdict, Versus
from fedcmp.evaluate.statistics import holm
from fedcmp.pipeline.errors import UserError, did_you_mean

_LEVEL = 0.05


def baseline_of(runs: Sequence[Judged], name: str | None) -> Judged:
    """The run that others are compared with: that of the name, else the first of FedAvg, else the first.

    Raises:
        UserError: No run has the name.
    """
    by_name = {run.result.name: run for run in runs}
    if name is not None:
        if name not in by_name:
            raise UserError(f"--baseline {name}: no evaluated run is called so{did_you_mean(name, by_name)}")
        return by_name[name]
    return next((run for run in runs if run.result.strategy == "fedavg"), runs[0])


def compared(runs: Sequence[Judged], baseline: Judged) -> Comparison | None:
    """Differences in every headline; None of a single run."""
    if len(runs) < 2:
        return None
    found: list[tuple[Judged, str, Row, int]] = []
    missing = []
    for run in runs:
        for name in dict.fromkeys([*baseline.benchmarks, *run.benchmarks]):
            without = [each.result.name for each in (run, baseline) if name not in each.answered]
            if run is baseline or without:
                if run is not baseline:
                    missing.append(f"{run.result.name}, {name}: no answers of {' and '.join(without)}")
                continue
            try:
                rows, dropped = differences_of(name, [run.answered[name], baseline.answered[name]])
            except UserError as error:
                missing.append(f"{run.result.name}, {name}: {error}")
                continue
            found += [(run, name, row, dropped) for row in rows]
    adjusted = holm([row.gap.p for _, _, row, _ in found])
    return Comparison(
        baseline.result.name,
        [_versus(*each, p) for each, p in zip(found, adjusted, strict=True)],
        missing,
    )


def _versus(run: Judged, benchmark: str, row: Row, dropped: int, adjusted: float) -> Versus:
    column: Column = (benchmark, row.metric.removeprefix(f"{benchmark}: "))
    gap, better = row.gap, run.result.better.get(column)
    side: Verdict = "higher" if gap.value > 0 else "lower"
    verdict: Verdict = "no clear difference"
    if adjusted < _LEVEL:
        verdict = side if better is None else "better" if side == better else "worse"
    return Versus(
        run.result.name,
        column,
        row.ours,
        row.theirs,
        gap.value,
        gap.low,
        gap.high,
        gap.p,
        adjusted,
        row.n,
        dropped,
        verdict,
    )
