"""`fedcmp evaluate`: stage three."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiments_options, only_benchmarks


@click.command()
@experiments_options
@only_benchmarks
def evaluate(configs: tuple[Path, ...], overrides: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Answer the benchmarks from cached features and score the answers.

    Each CONFIG is one run.

    \b
    Example:
      fedcmp evaluate configs/demo/fedcmp.toml
      fedcmp evaluate configs/demo/*.toml --benchmark pope
    """
    from fedcmp.components import load
    from fedcmp.evaluate.run import evaluate_runs

    evaluate_runs([load(config, overrides) for config in configs], only)
