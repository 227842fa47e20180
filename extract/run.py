"""Stage one of an experiment: every silo's cache checked, and made where it has to be."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import cache

from extract.encoders.base import ENCODERS, LoadedEncoder
from extract.runner import Outcome, current, extract_silo
from extract.sources.base import SOURCES
from pipeline.cache import FORMAT, Identity
from pipeline.config import Experiment
from pipeline.console import progress, say, table
from pipeline.device import pick_device, pick_dtype
from pipeline.errors import UserError, did_you_mean
from pipeline.manifest import write_atomic

_PROBLEMS_SHOWN = 5


def run(experiment: Experiment, *, only: Sequence[str], overwrite: bool) -> list[Outcome]:
    """Extract silos; the encoder is loaded once, and only if a silo needs it.

    Args:
        experiment: The configuration.
        only: Silos to look at; all where it is empty.
        overwrite: Encode again what is there already.

    Raises:
        UserError: A silo is unknown, its source is unusable, or its cache was made differently.
    """
    options = experiment.extract
    for name in only:
        if name not in options.silos:
            raise UserError(f"--silo {name}: there is no such silo{did_you_mean(name, options.silos)}")
    encoder = ENCODERS.build(options.encoder, "extract.encoder")
    sources = {
        name: SOURCES.build(component, f"extract.silos.{name}")
        for name, component in options.silos.items()
        if not only or name in only
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
            try:
                outcomes.append(extract_silo(path, source, identity, loaded(), options, device, task))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(f"{path}: the disk is full; free some space and rerun to go on") from None
    listing, names = experiment.features / "silos.txt", "".join(f"{name}\n" for name in options.silos)
    if not only and (not listing.is_file() or listing.read_text() != names):
        write_atomic(listing, names.encode())
    _summary(experiment, outcomes)
    return outcomes


def _summary(experiment: Experiment, outcomes: Sequence[Outcome]) -> None:
    table(
        f"Feature caches in {experiment.features}",
        ["silo", "images", "texts", "skipped", "MB", "images/s", "state"],
        [_row(outcome) for outcome in outcomes],
    )
    for outcome in outcomes:
        manifest = outcome.cache.manifest
        problems = [f"{item['id']}: {item['status']}, {item['reason']}" for item in manifest["failures"]]
        problems += [f"{place}: {reason}" for place, reason in manifest["skipped"]]
        for problem in problems[:_PROBLEMS_SHOWN]:
            say(f"skipped {problem}")
        if len(problems) > _PROBLEMS_SHOWN:
            more = len(problems) - _PROBLEMS_SHOWN
            say(f"  and {more} more in {outcome.cache.path / 'manifest.json'}")
    if all(outcome.state == "unchanged" for outcome in outcomes):
        say("Nothing to do: every cache is what the configuration asks for.")


def _row(outcome: Outcome) -> list[str]:
    manifest = outcome.cache.manifest
    failures = len(manifest["failures"])
    megabytes = sum(length for length, _ in manifest["files"].values()) / 1e6
    return [
        outcome.cache.path.stem,
        f"{manifest['images'] - failures:,}",
        f"{manifest['texts']:,}",
        f"{failures + len(manifest['skipped']):,}",
        f"{megabytes:,.1f}",
        f"{manifest['images'] / outcome.seconds:,.0f}" if outcome.seconds else "-",
        outcome.state,
    ]
