"""The sections about training: loss curves, and how clients were weighted round by round."""

from __future__ import annotations

from collections.abc import Sequence

from fedcmp.evaluate.report.charts import lines
from fedcmp.evaluate.report.heat import heat_map
from fedcmp.evaluate.report.results import RunResult

_LOSS = "nats a supervised token"
_FIGURES = {"reliability": "Reliability", "weight": "Weight"}


def curves(results: Sequence[RunResult]) -> dict[str, str]:
    """Charts of the training loss by file name: all runs together, then each run's clients."""
    by_client = {result.name: by_name for result in results if (by_name := _by_client(result, "loss"))}
    if not by_client:
        return {}
    means = {result.name: mean for result in results if (mean := _of_rounds(result))}
    values = [value for series in by_client.values() for points in series.values() for _, value in points]
    charts = {}
    if means:
        charts["loss.svg"] = lines("Training loss, mean over clients", means, _LOSS, width=560)
    for name, series in by_client.items():
        charts[f"loss-{name}.svg"] = lines(f"Training loss of {name}, by client", series, _LOSS, values)
    return charts


def _by_client(result: RunResult, figure: str) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in result.history:
        if row["client"] and row.get(figure) is not None:
            series.setdefault(row["client"], []).append((row["round"] + 1, row[figure]))
    place = {silo: number for number, silo in enumerate(result.silos)}
    return {client: series[client] for client in sorted(series, key=lambda each: (place.get(each, -1), each))}


def _of_rounds(result: RunResult) -> list[tuple[int, float]]:
    return [
        (row["round"] + 1, row["loss"])
        for row in result.history
        if row["client"] is None and row.get("loss") is not None
    ]


def weights(results: Sequence[RunResult]) -> dict[str, str]:
    """Heat maps of reliability and weight by file name, of the runs that have them."""
    charts = {}
    for number, result in enumerate(results):
        for figure, title in _FIGURES.items():
            series = _by_client(result, figure)
            if len(series) > 1:
                values = {client: dict(points) for client, points in series.items()}
                rounds = max(row["round"] for row in result.history) + 1
                high = 1.0 if figure == "reliability" else max(max(each.values()) for each in values.values())
                title_ = f"{title} of clients in {result.name}"
                charts[f"{figure}-{result.name}.svg"] = heat_map(
                    title_, values, rounds, high, f"{figure}-{number}"
                )
    return charts
