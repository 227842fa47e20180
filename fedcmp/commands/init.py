"""`fedcmp init`: an experiment file from what lies in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fedcmp.extract.discover import Found

_ANY_ENCODER = {"name": "transformers", "path": "/models/clip-vit-large-patch14-336"}
_ANY_LANGUAGE = "/models/vicuna-7b-v1.5"
_ANY_SILOS = {"berlin": {"name": "llava_json", "path": "/data/pairs.json", "images": "/data/images"}}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("."))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("experiment.toml"),
    show_default=True,
    help="The file to write.",
)
def init(folder: Path, out: Path) -> None:
    """Write a commented experiment file from what lies in a folder.

    Looks for pictures with texts (LLaVA JSON, webdataset, parquet, captions beside pictures), a silo for
    each, and for saved models: vision encoders and LLMs. Whatever is not there is a line to fill in.

    \b
    Example:
      fedcmp init /data
      fedcmp init . --out configs/clinics.toml
    """
    from fedcmp.extract.discover import discover, plain
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.files import write_atomic

    usable = plain(out.stem, "experiment")
    if out.stem != usable:
        raise UserError(f"--out {out}: a run is named after its file; give a name such as {usable}.toml")
    if out.exists():
        raise UserError(f"{out}: is there already; give another name with --out")
    found = discover(folder)
    write_atomic(out, "\n".join(_lines(out.stem, folder, found)).encode() + b"\n")
    say(
        f"Found in {folder}: {len(found.silos)} silos, {len(found.encoders)} encoders, "
        f"{len(found.languages)} LLMs"
    )
    for each in found.unused:
        say(f"  not used: {each}")
    say(f"Wrote {out}; look through it, then:")
    for command in ("plan", "extract", "federate", "evaluate"):
        say(f"  fedcmp {command} {out}")


def _lines(name: str, folder: Path, found: Found) -> Iterator[str]:
    yield f"# Written by fedcmp init from what lies in {folder}. `fedcmp show` prints it with every default."
    yield f"experiment = {json.dumps(name)}"
    yield f'features = "build/features/{name}"'
    yield ""
    yield "[extract.encoder]"
    first, *others = found.encoders or [_ANY_ENCODER]
    if not found.encoders:
        yield "# None was found: name a saved vision encoder."
    yield from _table(first)
    for other in others:
        yield "# Also found: " + ", ".join(_table(other))
    yield "layer = -2                # the penultimate block, as LLaVA"
    yield ""
    yield "[extract.silos]"
    if not found.silos:
        yield "# None was found: LLaVA JSON, webdataset shards, parquet files or a folder with captions."
    for silo, source in (found.silos or _ANY_SILOS).items():
        yield f"{json.dumps(silo)} = {{ {', '.join(_table(source))} }}"
    yield '# A silo with split = "test" is never trained on; fedcmp partition splits one data set into silos.'
    yield ""
    yield "[language]"
    if not found.languages:
        yield "# None was found: name a saved causal LM."
    language, *more = [str(path) for path in found.languages] or [_ANY_LANGUAGE]
    yield from _table({"path": language})
    for path in more:
        yield f"# Also found: {json.dumps(path)}"
    yield ""
    yield "[federate]"
    yield f"silos = {json.dumps(list(found.silos or _ANY_SILOS))}"
    yield "rounds = 10"
    yield "batch_size = 32"
    yield ""
    yield "[federate.optimizer]"
    yield "learning_rate = 1e-3      # LLaVA's, for 7B; LLMs below 1B want 2e-3 to 1e-2"
    yield ""
    yield "[federate.strategy]"
    yield 'name = "fedcmp"           # or "fedavg", "muon", ...'
    yield ""
    yield "# [evaluate]"
    yield '# silo = "heldout"'
    yield "# [evaluate.benchmarks.loss]"
    yield '# name = "heldout_loss"'


def _table(options: Mapping[str, str]) -> list[str]:
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in options.items()]
