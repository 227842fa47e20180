"""`fedcmp evaluate`, `fedcmp score` and `fedcmp report`: stage three."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import experiment_options

_only = click.option(
    "--benchmark", "only", multiple=True, metavar="NAME", help="Only this benchmark; repeatable."
)


@click.command()
@experiment_options
@_only
def evaluate(config: Path, overrides: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Answer the benchmarks from cached features and score the answers.

    \b
    Example:
      fedcmp evaluate configs/demo/fedcmp.toml
      fedcmp evaluate configs/demo/fedcmp.toml --benchmark pope
    """
    from evaluate.run import evaluate_run
    from pipeline.config import load

    evaluate_run(load(config, overrides), only)


@click.command()
@experiment_options
@_only
def score(config: Path, overrides: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Score saved answers again; no model is needed.

    \b
    Example:
      fedcmp score configs/demo/fedcmp.toml
    """
    from evaluate.run import score_run
    from pipeline.config import load

    score_run(load(config, overrides), only)


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable.")
def report(configs: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Compare the runs of an experiment on one page: HTML, Markdown and JSON.

    \b
    Example:
      fedcmp report configs/demo/*.toml
    """
    from evaluate.report import write_report
    from pipeline.config import load

    write_report([load(config, overrides) for config in configs])
