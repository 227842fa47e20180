"""`fedcmp evaluate`, `fedcmp score`, `fedcmp compare` and `fedcmp report`: stage three."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_only = click.option(
    "--benchmark", "only", multiple=True, metavar="NAME", help="Only this benchmark; repeatable."
)


def _runs(command: F) -> F:
    """Give a command its runs, each by its experiment file, and `--set`."""
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."
    )(command)
    return click.argument(
        "configs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CONFIG..."
    )(command)


@click.command()
@_runs
@_only
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


@click.command()
@_runs
@_only
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


@click.command()
@_runs
@_only
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


@click.command()
@_runs
def report(configs: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Compare the runs of an experiment on one page: HTML, Markdown and JSON.

    \b
    Example:
      fedcmp report configs/demo/*.toml
    """
    from fedcmp.components import load
    from fedcmp.evaluate.report.collect import write_report

    write_report([load(config, overrides) for config in configs])
