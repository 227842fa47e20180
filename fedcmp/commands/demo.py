"""`fedcmp demo`: the embedded default from data to report, wherever FedCMP is installed."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("fedcmp-demo"))
@click.option("--silo-images", default=1152, show_default=True, help="Images of a silo, on average.")
@click.option("--only-write", is_flag=True, help="Write data and experiment files, and run nothing.")
def demo(folder: Path, silo_images: int, only_write: bool) -> None:
    """Run the embedded default in a folder: no GPU, no download, a few minutes.

    Writes the demo's experiment files and data, then extracts, trains every run, evaluates and reports.
    Interrupted, the same command goes on.

    \b
    Example:
      fedcmp demo tour
      fedcmp demo tour --only-write
    """
    from fedcmp.components import load
    from fedcmp.evaluate.report.collect import write_report
    from fedcmp.evaluate.run import evaluate_runs
    from fedcmp.extract.run import run as extract
    from fedcmp.federate.run import run as federate
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.world.demo import demo as write_demo

    runs = write_demo(folder, silo_images=silo_images)
    say(f"Wrote the data to {folder / 'build/world'}, and a file for each run:")
    for run in runs:
        say(f"  {run}")
    if only_write:
        return
    files = [run.relative_to(folder) for run in runs]
    os.chdir(folder)
    experiments = [load(file) for file in files]
    extract(experiments[0], only=(), overwrite=False)
    for experiment in experiments:
        federate(experiment)
    evaluate_runs(experiments, ())
    write_report(experiments)
