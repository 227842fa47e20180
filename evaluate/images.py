"""Which images a benchmark needs, for stage one to encode."""

from __future__ import annotations

from pathlib import Path

from fedcmp.evaluate.benchmarks.base import Item
from fedcmp.evaluate.work import benchmarks_of
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError


def benchmark_images(experiment: Experiment, name: str, folder: Path | None) -> tuple[Path, list[str]]:
    """The folder of a benchmark's images and their names in it, each once, in the order of the questions.

    Images that are inside the benchmark's own files are written into the folder.

    Args:
        experiment: The configuration, which has the benchmark.
        name: Its name there.
        folder: Where the images are; by default where the configuration says.

    Raises:
        UserError: There is no such benchmark, its files cannot be read, or nothing says where images are.
    """
    benchmark = benchmarks_of(experiment, (name,))[name]
    if benchmark.silo is not None:
        raise UserError(
            f"--benchmark {name}: its images are those of silo '{benchmark.silo}'; extract that silo, or "
            f"remove evaluate.benchmarks.{name}.silo"
        )
    folder = folder or benchmark.images or experiment.evaluate.images
    if folder is None:
        raise UserError(f"--benchmark {name}: give the folder of its images with --images")
    found = benchmark.items(None)
    names = list(dict.fromkeys(each.image for each in found if isinstance(each, Item)))
    if not names:
        raise UserError(f"--benchmark {name}: its files name no image")
    say(f"{name}: {len(names)} images")
    benchmark.unpack(folder)
    return folder, names
