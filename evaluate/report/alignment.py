"""The section about alignment: rewards, distance and length by step, and answers before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedcmp.evaluate.report.charts import lines
from fedcmp.evaluate.report.results import RunResult
from fedcmp.evaluate.report.tables import Cell, folded, table

_FIGURES = {
    "reward": ("Reward, mean over sampled answers", "calibrated reward"),
    "kl": ("Distance from the reference (KL)", "nats a token"),
    "clipped": ("Tokens whose ratio was clipped", "share"),
    "length": ("Length of sampled answers", "tokens"),
}
START = "align-"


def curves(results: Sequence[RunResult]) -> dict[str, str]:
    """Charts by file name, with one line a run that was aligned."""
    charts = {}
    for figure, (title, unit) in _FIGURES.items():
        series = {result.name: points for result in results if (points := _points(result, figure))}
        if series:
            charts[f"{START}{figure}.svg"] = lines(title, series, unit)
    return charts


def _points(result: RunResult, figure: str) -> list[tuple[int, float]]:
    return [
        (row["round"] + 1, row[figure])
        for row in result.history
        if row["client"] is None and row.get(figure) is not None
    ]


def answers(results: Sequence[RunResult]) -> str:
    """Answers to public prompts before and after, a table a run."""
    parts = []
    for result in results:
        rows = [
            (each["kind"], [Cell(_question(each)), Cell(each["before"]), Cell(each["after"])])
            for each in result.sampled
        ]
        if rows:
            shown = table(
                f"Answers of {result.name}, drawn with the same random numbers",
                ["prompt", "question", "before", "after"],
                rows,
                "words",
            )
            parts.append(folded(f"Sampled answers of {result.name}", shown, opened=len(results) < 3))
    return "".join(parts)


def _question(sampled: Mapping[str, object]) -> str:
    asked = sampled["asked"]
    return " ".join(map(str, asked)).replace("<image>", "").strip() if isinstance(asked, list) else ""
