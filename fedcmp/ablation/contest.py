"""What an ablation was made to compare: ratios paired by seed, over scenarios and in each of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedcmp.ablation.file import Ablation
from fedcmp.evaluate.statistics import Ratio, holm, ratio

# Of the first measure, by scenario and strategy, in the order of seeds.
Values = Mapping[str, Mapping[str, list[float]]]


def primary(ablation: Ablation, values: Values, rival: str) -> Ratio:
    """The subject's ratio to a rival's; a seed's is the geometric mean over scenarios."""
    ours, theirs = (
        np.exp(np.mean([np.log(values[scenario][name]) for scenario in ablation.scenarios], 0))
        for name in (ablation.subject, rival)
    )
    return ratio(ours, theirs)


def rows(ablation: Ablation, values: Values) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; p over all scenarios is adjusted over rivals, the others over scenarios."""
    assert ablation.contest is not None
    rivals = [
        rival
        for rival in ablation.contest.rivals
        if all({rival, ablation.subject} <= values[scenario].keys() for scenario in ablation.scenarios)
    ]
    over_all = {rival: primary(ablation, values, rival) for rival in rivals}
    adjusted = dict(zip(rivals, holm([each.p for each in over_all.values()]), strict=True))
    columns = [f"{ablation.subject} / rival", "all scenarios", "p (Holm)", *ablation.scenarios]
    body = []
    for rival in rivals:
        inside = [
            ratio(values[scenario][ablation.subject], values[scenario][rival])
            for scenario in ablation.scenarios
        ]
        wins = [
            sum(a < b for a, b in zip(of[ablation.subject], of[rival], strict=True))
            for of in (values[scenario] for scenario in ablation.scenarios)
        ]
        cells = [
            f"{_interval(each)} p {p:.4f}, {won} of {len(ablation.seeds)}"
            for each, p, won in zip(inside, holm([each.p for each in inside]), wins, strict=True)
        ]
        body.append([rival, _interval(over_all[rival]), f"{adjusted[rival]:.4f}", *cells])
    blank = ["" for _ in ablation.scenarios]
    body += [[rival, "diverged", "", *blank] for rival in ablation.contest.rivals if rival not in rivals]
    return columns, body


def _interval(found: Ratio) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
