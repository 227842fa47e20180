"""`fedcmp score`: the last part of stage three, again."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiments_options, only_benchmarks


@click.command()
@experiments_options
@only_benchmarks
def score(configs: tuple[Path, ...], overrides: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Score saved answers again; no model is needed.

    \b
    Example:
      fedcmp score configs/demo/fedcmp.toml
      fedcmp score configs/demo/*.toml --benchmark pope --set evaluate.bootstrap=10000
    """
    from fedcmp.components import load
    from fedcmp.evaluate.run import score_runs

    score_runs([load(config, overrides) for config in configs], only)
