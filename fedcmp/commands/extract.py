"""`fedcmp extract`: stage one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedcmp.commands.options import experiment_options

if TYPE_CHECKING:
    from fedcmp.pipeline.config import Experiment


@click.command()
@experiment_options
@click.option("--silo", "silos", multiple=True, metavar="NAME", help="Only this silo; repeatable.")
@click.option("--overwrite", is_flag=True, help="Encode again what is there already.")
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    metavar="NAME",
    help="Encode this benchmark's images; repeatable.",
)
@click.option(
    "--images", type=click.Path(path_type=Path), metavar="FOLDER", help="Where the benchmark's images are."
)
@click.option(
    "--worker",
    metavar="I/N",
    help="Encode every N-th shard from the I-th on, beside other workers; 'auto' asks Slurm or torchrun.",
)
def extract(
    config: Path,
    overrides: tuple[str, ...],
    silos: tuple[str, ...],
    benchmarks: tuple[str, ...],
    images: Path | None,
    overwrite: bool,
    worker: str | None,
) -> None:
    """Encode every silo's images once and cache their patch features.

    With --benchmark the images that a configured benchmark asks about, and nothing else, become a
    cache of the benchmark's name.

    \b
    Example:
      fedcmp extract configs/demo.toml
      fedcmp extract configs/demo.toml --silo flat --set extract.batch_size=128
      fedcmp extract configs/demo.toml --worker 0/4
      fedcmp extract configs/demo.toml --benchmark pope --images build/world/heldout/images
    """
    from fedcmp.components import built, load
    from fedcmp.extract import workers
    from fedcmp.extract.run import run
    from fedcmp.pipeline.errors import UserError

    at_work = None if worker is None else workers.parse(worker, os.environ)
    experiment = load(config, overrides, "extract", "evaluate")
    if images is not None and len(benchmarks) != 1:
        raise UserError(f"--images {images}: give it with one --benchmark")
    for name in benchmarks:
        experiment = _with_benchmark(experiment, name, images)
    # A mistake in any stage costs no picture; torch, which strategies import, is needed then anyway.
    run(
        experiment,
        only=(*silos, *benchmarks),
        overwrite=overwrite,
        worker=at_work,
        before_encoding=lambda: built(experiment),
    )


def _with_benchmark(experiment: Experiment, name: str, images: Path | None) -> Experiment:
    """The experiment with one more silo: the images that a benchmark asks about."""
    from fedcmp.evaluate.images import benchmark_images
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.files import write_atomic
    from fedcmp.pipeline.options import Component

    if name in experiment.extract.silos:
        raise UserError(
            f"--benchmark {name}: a silo has this name, too; extract that with --silo {name}, or give the "
            "benchmark another name"
        )
    folder, names = benchmark_images(experiment, name, images)
    listing = experiment.features / f"{name}.images.txt"
    write_atomic(listing, "".join(f"{each}\n" for each in names).encode())
    options = {"name": "image_folder", "path": str(folder), "only": str(listing)}
    silos = {**experiment.extract.silos, name: Component.model_validate(options)}
    extract = experiment.extract.model_copy(update={"silos": silos})
    return experiment.model_copy(update={"extract": extract})
