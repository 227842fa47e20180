"""`fedcmp extract` and `fedcmp partition`: stage one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedcmp.cli import experiment_options, imported

if TYPE_CHECKING:
    from fedcmp.pipeline.config import Experiment


@click.command()
@experiment_options
@click.option("--silo", "silos", multiple=True, metavar="NAME", help="Only this silo; repeatable.")
@click.option("--overwrite", is_flag=True, help="Encode again what is there already.")
@click.option("--benchmark", "benchmarks", multiple=True, metavar="NAME", help="Its images; repeatable.")
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
    from fedcmp.extract import workers
    from fedcmp.extract.run import run
    from fedcmp.pipeline.config import load
    from fedcmp.pipeline.errors import UserError

    at_work = None if worker is None else workers.parse(worker, os.environ)
    experiment = load(config, overrides)
    if images is not None and len(benchmarks) != 1:
        raise UserError(f"--images {images}: give it with one --benchmark")
    for name in benchmarks:
        experiment = with_benchmark(experiment, name, images)
    run(experiment, only=(*silos, *benchmarks), overwrite=overwrite, worker=at_work)


def with_benchmark(experiment: Experiment, name: str, images: Path | None) -> Experiment:
    """The experiment with one more silo: the images that a benchmark asks about."""
    from fedcmp.pipeline.config import Component
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.manifest import write_atomic

    if name in experiment.extract.silos:
        raise UserError(
            f"--benchmark {name}: a silo is called so too; extract that with --silo {name}, or give the "
            "benchmark another name"
        )
    folder, names = imported("fedcmp.evaluate.images:benchmark_images")(experiment, name, images)
    listing = experiment.features / f"{name}.images.txt"
    write_atomic(listing, "".join(f"{each}\n" for each in names).encode())
    options = {"name": "image_folder", "path": str(folder), "only": str(listing)}
    silos = {**experiment.extract.silos, name: Component.model_validate(options)}
    extract = experiment.extract.model_copy(update={"silos": silos})
    return experiment.model_copy(update={"extract": extract})


@click.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the silos' files.")
@click.option(
    "--by",
    type=click.Choice(["field", "dirichlet", "quantity", "hash"]),
    required=True,
    help="One silo a label; labels spread unevenly; sizes as told; evenly by the image name's SHA-256.",
)
@click.option("--field", metavar="KEY", help="Label: a key of the JSON entry; dots go deeper.")
@click.option(
    "--component", type=int, metavar="K", help="Label: part K of the image's path, from 0 or from -1."
)
@click.option("--pattern", metavar="REGEX", help="Label: the first group of REGEX in the image's path.")
@click.option("--silos", type=int, help="Number of silos.")
@click.option("--name", "names", multiple=True, help="A silo's name; repeatable, instead of --silos.")
@click.option("--alpha", type=float, help="Concentration of the Dirichlet draw; small is uneven.")
@click.option("--shares", metavar="A,B,...", help="Sizes of --by quantity, in proportion.")
@click.option("--power", type=float, help="Sizes of --by quantity fall as k^-POWER.")
@click.option("--min-size", type=int, default=1, show_default=True, help="Images each silo has at least.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--images", metavar="FOLDER", help="Where images are; by default where the source has them.")
@click.option("--overwrite", is_flag=True, help="Replace another partition.")
def partition(
    source: str, out: Path, shares: str | None, images: str | None, overwrite: bool, **options: Any
) -> None:
    """Split one data set into silos, all texts of an image in one of them.

    SOURCE is LLaVA JSON or JSON lines, or a .toml with a source's name and options.

    \b
    Example:
      fedcmp partition pairs.json --out silos --by field --field hospital
      fedcmp partition pairs.json --out silos --by dirichlet --component 0 --silos 8 --alpha 0.3 --min-size 50
      fedcmp partition folder.toml --out silos --by quantity --shares 5,3,2
    """
    from fedcmp.extract.partition import Partition
    from fedcmp.extract.partition import partition as split
    from fedcmp.pipeline.config import validate

    given = {key: value for key, value in options.items() if value is not None}
    if shares is not None:
        given["shares"] = [share.strip() for share in shares.split(",")]
    split(source, out, validate(Partition, given, "", "fedcmp partition"), images=images, overwrite=overwrite)
