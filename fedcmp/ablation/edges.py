"""Options whose best value lies at the edge of the grid that they were chosen from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedcmp.ablation.file import Ablation, Chosen


def at_edges(ablation: Ablation, tuned: Mapping[tuple[str, str], Chosen]) -> Iterator[str]:
    """What was not tuned, in words: numbers chosen at an end of their grid.

    Zero is no such end, as what is off cannot be turned down.

    Args:
        ablation: With the grids.
        tuned: The options of every (scenario, strategy).
    """
    for (scenario, strategy), chosen in tuned.items():
        values = dict(chosen)
        for name, grid in ablation.strategies[strategy].items():
            if not isinstance(grid, list) or not all(type(each) in (int, float) for each in grid):
                continue
            best = values[name]
            if best != 0 and best in (min(grid), max(grid)):
                among = ", ".join(map(str, sorted(grid)))
                yield f"{strategy}, {scenario}: {name} = {best}, at the edge of {among}"
