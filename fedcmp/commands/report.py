"""`fedcmp report`: runs on one page."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiments_options


@click.command()
@experiments_options
def report(configs: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Compare the runs of an experiment on one page: HTML, Markdown and JSON.

    \b
    Example:
      fedcmp report configs/demo/*.toml
    """
    from fedcmp.components import load
    from fedcmp.evaluate.report.collect import write_report

    write_report([load(config, overrides) for config in configs])
