"""`fedcmp extract`: stage one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import experiment_options

if TYPE_CHECKING:
    from extract.encoders.base import LoadedEncoder


@click.command()
@experiment_options
@click.option("--silo", "silos", multiple=True, metavar="NAME", help="Only this silo; repeatable.")
@click.option("--overwrite", is_flag=True, help="Encode again what is there already.")
def extract(config: Path, overrides: tuple[str, ...], silos: tuple[str, ...], overwrite: bool) -> None:
    """Encode every silo's images once and cache their patch features.

    \b
    Example:
      fedcmp extract configs/demo.toml
      fedcmp extract configs/demo.toml --silo flat --set extract.batch_size=128
    """
    from extract.encoders.base import ENCODERS
    from extract.runner import Outcome, current, extract_silo
    from extract.sources.base import SOURCES
    from pipeline.cache import FORMAT, Identity
    from pipeline.config import load
    from pipeline.console import progress, say, table
    from pipeline.device import pick_device, pick_dtype
    from pipeline.errors import UserError, did_you_mean
    from pipeline.manifest import write_atomic

    experiment = load(config, overrides)
    options = experiment.extract
    for name in silos:
        if name not in options.silos:
            raise UserError(f"--silo {name}: {config} has no such silo{did_you_mean(name, options.silos)}")
    encoder = ENCODERS.build(options.encoder, "extract.encoder")
    sources = {
        name: SOURCES.build(component, f"extract.silos.{name}")
        for name, component in options.silos.items()
        if not silos or name in silos
    }
    device = pick_device(experiment.device)
    compute_dtype = pick_dtype(options.compute_dtype, device)
    key = {
        "format": FORMAT,
        "encoder": encoder.identity(),
        "compute_dtype": compute_dtype,
        "dtype": options.dtype,
    }

    @cache
    def loaded() -> LoadedEncoder:
        return encoder.load(device, compute_dtype)

    outcomes = []
    for name, source in sources.items():
        path = experiment.cache_path(name)
        identity = Identity(key, source.identity())
        done = current(path, identity, overwrite=overwrite)
        if done is not None:
            outcomes.append(Outcome(done, "unchanged", 0.0))
            continue
        with progress(name, source.size(), "images") as task:
            outcomes.append(extract_silo(path, source, identity, loaded(), options, device, task))
    names = "".join(f"{name}\n" for name in options.silos)
    listing = experiment.features / "silos.txt"
    if not silos and (not listing.is_file() or listing.read_text() != names):
        write_atomic(listing, names.encode())
    rows = []
    for outcome in outcomes:
        manifest = outcome.cache.manifest
        size = sum(length for length, _ in manifest["files"].values())
        rate = f"{manifest['images'] / outcome.seconds:,.0f}" if outcome.seconds else "-"
        rows.append(
            [
                outcome.cache.path.stem,
                f"{manifest['images'] - len(manifest['failures']):,}",
                f"{manifest['texts']:,}",
                f"{len(manifest['failures']) + len(manifest['skipped']):,}",
                f"{size / 1e6:,.1f}",
                rate,
                outcome.state,
            ]
        )
    table(
        f"Feature caches in {experiment.features}",
        ["silo", "images", "texts", "skipped", "MB", "images/s", "state"],
        rows,
    )
    for outcome in outcomes:
        manifest = outcome.cache.manifest
        problems = [f"{item['id']}: {item['status']}, {item['reason']}" for item in manifest["failures"]]
        problems += [f"{place}: {reason}" for place, reason in manifest["skipped"]]
        for problem in problems[:5]:
            say(f"skipped {problem}")
        if len(problems) > 5:
            say(f"  and {len(problems) - 5} more in {outcome.cache.path / 'manifest.json'}")
    if all(outcome.state == "unchanged" for outcome in outcomes):
        say("Nothing to do: every cache is what the configuration asks for.")
