"""`fedcmp federate`: stage two."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import experiment_options


@click.command()
@experiment_options
def federate(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the projector federatedly from the caches, against the frozen LLM.

    \b
    Example:
      fedcmp federate configs/demo/fedcmp.toml
      fedcmp federate configs/demo/fedavg.toml --set federate.rounds=5 --set run=short
    """
    from federate.run import run
    from pipeline.config import load

    run(load(config, overrides))
