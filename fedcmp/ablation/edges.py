"""Grids whose best value lies at their edge: what to try beyond it, and what stays there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedcmp.ablation.file import Ablation, Chosen

# What numbers each option of a strategy was chosen from.
Tried = dict[str, list[float]]


def numbers(ablation: Ablation, strategy: str) -> Tried:
    """The grids of a strategy that are of numbers, in order."""
    return {
        name: sorted(values)
        for name, values in ablation.strategies[strategy].items()
        if isinstance(values, list) and all(type(each) in (int, float) for each in values)
    }


def edges(tried: Mapping[str, Sequence[float]], chosen: Chosen) -> Iterator[str]:
    """Options whose chosen number is the first or the last of those tried.

    Zero is no such end, as what is off cannot be turned down.
    """
    values = dict(chosen)
    for name, among in tried.items():
        if values[name] != 0 and values[name] in (among[0], among[-1]):
            yield name


def beyond(among: Sequence[float], best: float) -> list[float]:
    """What may be tried beyond the end of some numbers at which the best lies, first what is preferred.

    It is as far from the end as the number before, as a ratio; and half-way to 1 where that is too far for an
    option that must stay below.
    """
    last, before = (among[0], among[1:2]) if best == among[0] else (among[-1], among[-2:-1])
    ratio = last / before[0] if before and before[0] else (0.5 if best == among[0] else 2.0)
    further: list[float] = [last * ratio]
    if last < 1 < ratio:
        further.append((1 + last) / 2)
    if isinstance(last, int):
        return [number for number in map(round, further) if number != last]
    return [float(f"{number:.3g}") for number in further]


def at_edges(
    ablation: Ablation,
    tuned: Mapping[tuple[str, str], Chosen],
    tried: Mapping[tuple[str, str], Tried] | None = None,
) -> Iterator[str]:
    """What was not tuned, in words: numbers chosen at an end of their grid.

    Args:
        ablation: With the grids.
        tuned: The options of every (scenario, strategy).
        tried: The numbers that they were chosen from; those of the grids by default.
    """
    for (scenario, strategy), chosen in tuned.items():
        among = numbers(ablation, strategy) if tried is None else tried[scenario, strategy]
        for name in edges(among, chosen):
            values: Any = ", ".join(map(str, among[name]))
            yield f"{strategy}, {scenario}: {name} = {dict(chosen)[name]}, at the edge of {values}"
