"""`fedcmp evaluate`: stage three."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedcmp.commands.options import experiments_options, only_benchmarks

if TYPE_CHECKING:
    from fedcmp.pipeline.config import Experiment


@click.command()
@experiments_options
@only_benchmarks
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only the first N questions of each benchmark; scores say so.",
)
def evaluate(
    configs: tuple[Path, ...], overrides: tuple[str, ...], only: tuple[str, ...], limit: int | None
) -> None:
    """Answer the benchmarks from cached features and score the answers.

    Each CONFIG is one run. With --limit, scores, report and comparisons are of those questions alone and
    say so, until the run is evaluated without it, which keeps the answers that are there.

    \b
    Example:
      fedcmp evaluate configs/demo/fedcmp.toml
      fedcmp evaluate configs/demo/*.toml --benchmark pope
      fedcmp evaluate configs/demo/fedcmp.toml --limit 50
      torchrun --nproc-per-node 2 -m fedcmp evaluate configs/demo/fedcmp.toml
    """
    from fedcmp.components import load
    from fedcmp.pipeline.ranks import joined

    def runs() -> list[Experiment]:
        return [load(config, overrides) for config in configs]

    with joined() as ranks:
        if ranks is None or ranks.leads:
            from fedcmp.evaluate.run import evaluate_runs

            evaluate_runs(runs(), only, limit, ranks)
        else:
            from fedcmp.evaluate.ranks import follow

            follow(runs, ranks)
