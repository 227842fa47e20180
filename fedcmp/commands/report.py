"""`fedcmp report`: runs on one page."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiments_options


@click.command()
@click.option("--baseline", metavar="RUN", help="Run to compare with; by default FedAvg's, else the first.")
@experiments_options
def report(configs: tuple[Path, ...], overrides: tuple[str, ...], baseline: str | None) -> None:
    """Compare the runs of an experiment on one page, with tables and charts as files beside it.

    \b
    Example:
      fedcmp report configs/demo/*.toml
      fedcmp report configs/demo/*.toml --baseline centralised
    """
    from fedcmp.components import load
    from fedcmp.evaluate.report.collect import write_report

    write_report([load(config, overrides) for config in configs], baseline)
