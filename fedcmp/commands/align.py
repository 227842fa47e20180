"""`fedcmp align`: the second half of stage two."""

from __future__ import annotations

from pathlib import Path

import click

from fedcmp.commands.options import experiment_options


@click.command()
@experiment_options
def align(config: Path, overrides: tuple[str, ...]) -> None:
    """Align a trained projector with what the silos prefer, judged by their own reward models (MoR).

    \b
    Example:
      fedcmp align configs/align/mor.toml
      fedcmp align configs/align/mor.toml --set align.steps=40 --set run=short
    """
    from fedcmp.components import load
    from fedcmp.federate.preference.run import align as run
    from fedcmp.federate.preference.run import refuse
    from fedcmp.pipeline.ranks import refuse_ranks

    refuse_ranks("fedcmp align")
    experiment = load(config, overrides)
    refuse(experiment)
    run(experiment)
