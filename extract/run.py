"""Stage one of an experiment: every silo's cache checked, and made where it has to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from fedcmp.extract.encoders.base import ENCODERS, LoadedEncoder
from fedcmp.extract.pictures import NOTES
from fedcmp.extract.shortage import shortage
from fedcmp.extract.silo import Outcome, current, extract_silo
from fedcmp.extract.sources.base import SOURCES
from fedcmp.extract.workers import Worker
from fedcmp.pipeline.cache import FORMAT, FeatureCache, Identity, differences
from fedcmp.pipeline.cache.mirror import pull, push, remote_manifest, to_be_sent
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress, say, table
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.models.device import pick_device, pick_dtype
from fedcmp.pipeline.remote import Remote

_PROBLEMS_SHOWN = 5


def run(
    experiment: Experiment,
    *,
    only: Sequence[str],
    overwrite: bool,
    worker: Worker | None = None,
    before_encoding: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Extract silos; the encoder is loaded once, and only if a silo needs it.

    Args:
        experiment: The configuration.
        only: Silos to look at; all where it is empty.
        overwrite: Encode again what is there already.
        worker: Encode only this worker's shards, beside others.
        before_encoding: Called once if a silo has to be encoded, before the encoder is loaded.

    Raises:
        UserError: A silo is unknown, its source is unusable, or its cache was made differently.
    """
    options = experiment.extract
    if worker is not None and overwrite:
        raise UserError(
            "--worker with --overwrite: each worker would discard the others' shards; delete the cache"
        )
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
        "encoder": encoder.identity() | options.encoder.provenance,
        "compute_dtype": compute_dtype,
        "dtype": options.dtype,
    }

    @cache
    def loaded() -> LoadedEncoder:
        before_encoding()
        return encoder.load(device, compute_dtype)

    outcomes = []
    for name, source in sources.items():
        path = experiment.cache_path(name)
        identity = Identity(key, source.identity() | options.silos[name].provenance)
        if experiment.store is not None and not overwrite:
            _take_over(Remote(experiment.store) / path.name, path, identity)
        done = current(path, identity, overwrite=overwrite)
        if done is not None:
            outcomes.append(Outcome(path, done, "unchanged", 0.0))
            _send(experiment, path)
            continue
        if experiment.store is not None:
            to_be_sent(path)
        with progress(name, source.size(), "images") as task:
            try:
                outcomes.append(extract_silo(path, source, identity, loaded(), options, device, task, worker))
            except (OSError, MemoryError, RuntimeError) as error:
                short = shortage(error)
                if short is None:
                    raise
                raise UserError(f"{path}: {short} and rerun to go on") from None
        if outcomes[-1].cache is not None:
            _send(experiment, path)
    _summary(experiment, outcomes)
    return outcomes


def _take_over(remote: Remote, path: Path, identity: Identity) -> None:
    """Fetch a silo's cache from the store if it is just what would be made now.

    Raises:
        UserError: The cache there was made by another encoder or in another way.
    """
    made = remote_manifest(remote)
    if made is None:
        return
    changed = differences(identity.key, made.get("key"))
    if changed:
        raise UserError(
            f"{remote}: the configuration and the cache there differ in {'; '.join(changed)}; set another "
            "'store' or 'features', or pass --overwrite to encode the silo again"
        )
    if made.get("source") == identity.source:
        pull(remote, path)


def _send(experiment: Experiment, path: Path) -> None:
    if experiment.store is not None:
        push(path, Remote(experiment.store) / path.name)


def _summary(experiment: Experiment, outcomes: Sequence[Outcome]) -> None:
    table(
        f"Feature caches in {experiment.features}",
        ["silo", "images", "texts", "skipped", "MB", "images/s", "state"],
        [_row(outcome) for outcome in outcomes],
    )
    for outcome in outcomes:
        if outcome.cache is None:
            continue
        manifest = outcome.cache.manifest
        problems = [f"{item['id']}: {item['status']}, {item['reason']}" for item in manifest["failures"]]
        problems += [f"{place}: {reason}" for place, reason in manifest["skipped"]]
        for problem in problems[:_PROBLEMS_SHOWN]:
            say(f"skipped {problem}")
        if len(problems) > _PROBLEMS_SHOWN:
            more = len(problems) - _PROBLEMS_SHOWN
            say(f"  and {more} more in {outcome.cache.path / 'manifest.json'}")
        for note, number in manifest.get("notes", {}).items():
            say(f"{outcome.path.stem}: " + NOTES[note].format(f"{number:,} picture{'s' * (number > 1)}"))
        lost = outcome.cache.texts - _usable(outcome.cache)
        if lost:
            say(
                f"{outcome.path.stem}: {lost:,} text{'s' * (lost > 1)} on pictures without features, not used"
            )
    if all(outcome.state == "unchanged" for outcome in outcomes):
        say("Nothing to do: every cache is what the configuration asks for.")


def _usable(cache: FeatureCache) -> int:
    """Texts about pictures that have features."""
    return int((cache.status[cache.text_image] == 0).sum())


def _row(outcome: Outcome) -> list[str]:
    if outcome.cache is None:
        return [outcome.path.stem, "-", "-", "-", "-", "-", outcome.state]
    manifest = outcome.cache.manifest
    failures = len(manifest["failures"])
    megabytes = sum(length for length, _ in manifest["files"].values()) / 1e6
    return [
        outcome.path.stem,
        f"{manifest['images'] - failures:,}",
        f"{_usable(outcome.cache):,}",
        f"{failures + len(manifest['skipped']):,}",
        f"{megabytes:,.1f}",
        f"{manifest['images'] / outcome.seconds:,.0f}" if outcome.seconds else "-",
        outcome.state,
    ]
