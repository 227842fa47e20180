"""`fedcmp partition`: one data set into silos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the silos' files.")
@click.option(
    "--by",
    type=click.Choice(["field", "dirichlet", "quantity", "hash"]),
    required=True,
    help="field: a silo for each label; dirichlet: labels spread unevenly; quantity: given sizes; hash: "
    "evenly, by the SHA-256 of the image's name.",
)
@click.option(
    "--field", metavar="KEY", help="Label: a key of the JSON entry (dots go deeper), or a table's column."
)
@click.option(
    "--component", type=int, metavar="K", help="Label: part K of the image's path, from 0 or from -1."
)
@click.option("--pattern", metavar="REGEX", help="Label: the first group of REGEX in the image's path.")
@click.option("--silos", type=int, help="Number of silos.")
@click.option("--name", "names", multiple=True, help="A silo's name; repeatable, instead of --silos.")
@click.option("--alpha", type=float, help="Concentration of the Dirichlet draw; small is uneven.")
@click.option("--shares", metavar="A,B,...", help="Sizes of --by quantity, in proportion.")
@click.option("--power", type=float, help="Sizes of --by quantity fall as k^-POWER.")
@click.option("--min-size", type=int, default=1, show_default=True, help="Fewest images of a silo.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every draw.")
@click.option("--images", metavar="FOLDER", help="Where images are; by default where the source has them.")
@click.option("--write-images", is_flag=True, help="Write the pictures into OUT/images, too.")
@click.option("--overwrite", is_flag=True, help="Replace another partition.")
def partition(
    source: str,
    out: Path,
    shares: str | None,
    images: str | None,
    write_images: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Split one data set into silos, all texts of an image in one of them.

    SOURCE is LLaVA JSON or JSON lines, or a .toml with a source's name and options.

    \b
    Example:
      fedcmp partition pairs.json --out silos --by field --field hospital
      fedcmp partition pairs.json --out silos --by dirichlet --component 0 --silos 8 --alpha 0.3 --min-size 50
      fedcmp partition parquet.toml --out silos --by quantity --shares 5,3,2 --write-images
    """
    from fedcmp.extract.deal import Partition
    from fedcmp.extract.partition import partition as split
    from fedcmp.pipeline.options import validate

    given = {key: value for key, value in options.items() if value is not None}
    if shares is not None:
        given["shares"] = [share.strip() for share in shares.split(",")]
    split(
        source,
        out,
        validate(Partition, given, "", "fedcmp partition"),
        images=images,
        write_images=write_images,
        overwrite=overwrite,
    )
