"""`fedcmp extract`: stage one."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import experiment_options


@click.command()
@experiment_options
@click.option("--silo", "silos", multiple=True, metavar="NAME", help="Only this silo; repeatable.")
@click.option("--overwrite", is_flag=True, help="Encode again what is there already.")
def extract(config: Path, overrides: tuple[str, ...], silos: tuple[str, ...], overwrite: bool) -> None:
    """Encode every silo's images once and cache their patch features.

    \b
    Example:
      fedcmp extract configs/demo.toml
      fedcmp extract configs/demo.toml --silo flat --set extract.batch_size=128
    """
    from extract.run import run
    from pipeline.config import load

    run(load(config, overrides), only=silos, overwrite=overwrite)
