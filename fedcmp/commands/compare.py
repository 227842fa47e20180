"""`fedcmp compare`: one run against another."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiments_options, only_benchmarks


@click.command()
@experiments_options
@only_benchmarks
def compare(configs: tuple[Path, ...], overrides: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Test whether one run is better than another on the same questions.

    CONFIGs are a run and the run it is compared with; further pairs are the same two methods with
    other seeds.

    \b
    Example:
      fedcmp compare configs/demo/fedcmp.toml configs/demo/fedavg.toml
      fedcmp compare a-seed0.toml b-seed0.toml a-seed1.toml b-seed1.toml --benchmark pope
    """
    from fedcmp.components import load
    from fedcmp.evaluate.compare import compare_runs

    compare_runs([load(config, overrides) for config in configs], only)
