"""Read, decode, encode, write: one silo's records into its feature cache, resumable by shard."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from fedcmp.extract.decode import Decoded, decode, decode_all
from fedcmp.extract.encoders.base import LoadedEncoder
from fedcmp.extract.sources.base import Skipped, Source
from fedcmp.extract.workers import Worker
from fedcmp.pipeline.cache import (
    STATUS,
    CacheWriter,
    CorruptCacheError,
    FeatureCache,
    Identity,
    Quantiser,
    Row,
    differences,
    finish_commit,
    open_writer,
    partial_path,
    settling,
    started_key,
    to_storage,
)
from fedcmp.pipeline.cache.format import images_in
from fedcmp.pipeline.cache.int8 import SAMPLE_IMAGES
from fedcmp.pipeline.config import Extract
from fedcmp.pipeline.console import Task, say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models.device import device_type
from fedcmp.pipeline.plugins import blamed
from fedcmp.pipeline.records import Record, improper

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_BY_OTHERS = "finished by other workers"


@dataclass(frozen=True)
class Outcome:
    """What happened to one silo; there is no cache yet where other workers still have shards to do."""

    path: Path
    cache: FeatureCache | None
    state: str
    seconds: float


def current(path: Path, identity: Identity, *, overwrite: bool) -> FeatureCache | None:
    """The committed cache if it is just what would be made now.

    Raises:
        UserError: What is there, whole or unfinished, was made by another encoder or in another way,
            and `overwrite` is not given.
    """
    if (partial_path(path) / "manifest.json").is_file():
        with settling(path):
            finish_commit(path)
    key = started_key(path)
    changed = differences(identity.key, key) if key is not None else []
    if changed and not overwrite:
        raise UserError(
            f"{path}: the configuration and the cache there differ in {'; '.join(changed)}; set another "
            "'features' directory, or pass --overwrite to encode the silo again"
        )
    if overwrite or not (path / "manifest.json").is_file():
        return None
    try:
        cache = FeatureCache(path)
    except CorruptCacheError as error:
        say(str(error))
        return None
    changed = differences(identity.source, cache.manifest["source"])
    if changed:
        say(f"{path}: encoding again, because {'; '.join(changed)}")
        return None
    return cache


def extract_silo(
    path: Path,
    source: Source,
    identity: Identity,
    encoder: LoadedEncoder,
    options: Extract,
    device: str,
    task: Task,
    worker: Worker | None = None,
) -> Outcome:
    """Encode a silo into its cache, continuing where a killed run stopped.

    One of several workers encodes its own shards only; whoever finds all of them finished commits.

    Raises:
        UserError: No image can be read, or another process is at work on this silo.
    """
    start = time.monotonic()
    skipped: list[Skipped] = []
    shards: list[str] = []
    resumed = 0
    # On the CPU decoding would take the encoder's cores, whose threads wait for each other.
    beside = device_type(device) != "cpu"
    layout = {"patches": encoder.patches, "d_vision": encoder.d_vision, "dtype": options.dtype}
    shard_images = options.shard_images
    if options.shard_mb is not None:
        shard_images = images_in(options.shard_mb, encoder.patches, encoder.d_vision, options.dtype)
    with (
        open_writer(
            path, identity, together=worker is not None, **layout, shard_images=shard_images
        ) as writer,
        ThreadPoolExecutor(options.workers) as pool,
    ):
        if writer is None:
            return Outcome(path, FeatureCache(path), _BY_OTHERS, 0.0)
        quantiser = None
        if options.dtype == "int8":
            quantiser = writer.calibrate(lambda: _calibrate(source, encoder, options, pool))
        for number, chunk in enumerate(chunks(_only_records(source, skipped), shard_images)):
            shards.append(fingerprint([record.id for record in chunk]))
            if worker is None or worker.owns(number):
                with writer.claim(number) as mine:
                    if mine and _is_finished(writer, number, shards[number]):
                        resumed += 1
                    elif mine:
                        encoded = _encode_shard(chunk, encoder, options, pool, quantiser, beside=beside)
                        writer.write(number, *encoded)
            task.advance(len(chunk))
        with settling(path):
            recorded = writer.recorded()
            if recorded is None:
                return Outcome(path, FeatureCache(path), _BY_OTHERS, time.monotonic() - start)
            if not _all_finished(writer, recorded, shards):
                done = f"{len(recorded)} of {len(shards)} shards; the rest is other workers'"
                return Outcome(path, None, done, time.monotonic() - start)
            _require_usable(path, writer, skipped)
            cache = writer.commit(
                {
                    "silo": path.stem,
                    "probe": _probe(encoder, options.dtype),
                    "skipped": [[item.place, item.reason] for item in skipped],
                    "made_by": provenance(device),
                    **({"licence": options.licence} if options.licence else {}),
                },
            )
    state = f"resumed at shard {resumed}" if resumed else "extracted"
    return Outcome(path, cache, state, time.monotonic() - start)


def _is_finished(writer: CacheWriter, shard: int, ids: str) -> bool:
    rows = writer.finished(shard)
    return rows is not None and fingerprint([row.id for row in rows]) == ids


def _all_finished(writer: CacheWriter, recorded: set[int], shards: Sequence[str]) -> bool:
    """Whether every shard is whole; files of other workers are hashed only if none is missing."""
    if not recorded.issuperset(range(len(shards))):
        return False
    return all(shard in writer.held or _is_finished(writer, shard, ids) for shard, ids in enumerate(shards))


def _require_usable(path: Path, writer: CacheWriter, skipped: Sequence[Skipped]) -> None:
    if any(row.status == 0 for row in writer.rows):
        return
    first = [*(Skipped(row.id, row.reason) for row in islice(writer.rows, 1)), *skipped][:1]
    why = f"; first, {first[0].place}: {first[0].reason}" if first else "; the source is empty"
    raise UserError(f"{path}: not one image could be read{why}")


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Split an iterable into lists of `size`, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _only_records(source: Source, skipped: list[Skipped]) -> Iterator[Record]:
    for item in source.records():
        if isinstance(item, Skipped):
            skipped.append(item)
        elif why := improper(item.id):
            skipped.append(Skipped(ascii(item.id)[1:-1], f"its name cannot be that of an image: {why}"))
        else:
            yield item


def _calibrate(
    source: Source, encoder: LoadedEncoder, options: Extract, pool: ThreadPoolExecutor
) -> Quantiser:
    """Channels of the first readable images."""
    sample: list[np.ndarray] = []
    for records in chunks(_only_records(source, []), options.batch_size):
        decoded = decode_all(records, pool.map(lambda record: decode(record, encoder), records), encoder)
        features = _encode(decoded, encoder).numpy()
        readable = [item.pixels is not None for item in decoded]
        sample += [each for each in features[readable] if np.isfinite(each).all()]
        if len(sample) >= SAMPLE_IMAGES:
            break
    return Quantiser.fit(np.stack(sample[:SAMPLE_IMAGES]) if sample else np.zeros((0, 1, 1), np.float32))


def _encode_shard(
    records: Sequence[Record],
    encoder: LoadedEncoder,
    options: Extract,
    pool: ThreadPoolExecutor,
    quantiser: Quantiser | None,
    *,
    beside: bool,
) -> tuple[np.ndarray, list[Row], list[float] | None]:
    features: list[np.ndarray] = []
    rows: list[Row] = []
    measured = [0.0] * 4 if quantiser else None
    for decoded in _decoded(list(chunks(records, options.batch_size)), encoder, pool, beside=beside):
        encoded = _encode(decoded, encoder)
        known = _rows(decoded, encoded, options.dtype)
        stored = (
            to_storage(encoded, options.dtype) if quantiser is None else quantiser.encode(encoded.numpy())
        )
        unusable = [place for place, row in enumerate(known) if row.status]
        stored[unusable] = 0
        if quantiser is not None and measured is not None:
            usable = [place for place, row in enumerate(known) if not row.status]
            costs = quantiser.error(encoded.numpy()[usable], stored[usable])
            measured = [old + new for old, new in zip(measured, costs, strict=True)]
        features.append(stored)
        rows += known
    return np.concatenate(features), rows, measured


def _decoded(
    batches: Sequence[Sequence[Record]], encoder: LoadedEncoder, pool: ThreadPoolExecutor, *, beside: bool
) -> Iterator[list[Decoded]]:
    """Pictures of every batch; `beside` decodes the next one while the caller is at work on this one."""

    def submit(batch: Sequence[Record]) -> list[Future[Decoded]]:
        return [pool.submit(decode, record, encoder) for record in batch]

    ahead = submit(batches[0])
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        decoded = decode_all(batch, (future.result() for future in ahead), encoder)
        if beside:
            ahead = submit(following)
        yield decoded
        if not beside:
            ahead = submit(following)


def _encode(decoded: Sequence[Decoded], encoder: LoadedEncoder) -> torch.Tensor:
    """Features `(images, patches, d_vision)` float32 on the CPU; zero where there is no picture."""
    import torch

    features = torch.zeros(len(decoded), encoder.patches, encoder.d_vision)
    usable = [place for place, item in enumerate(decoded) if item.pixels is not None]
    if usable:
        pixels = torch.from_numpy(np.stack([item.pixels for item in decoded if item.pixels is not None]))
        with blamed(encoder, "extract.encoder"):
            features[usable] = _encoded(encoder, pixels).cpu()
    return features


def _encoded(encoder: LoadedEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """Features of the form that the encoder has declared.

    Raises:
        TypeError: They are something else.
    """
    import torch

    features = encoder.encode(pixels)
    expected = (len(pixels), encoder.patches, encoder.d_vision)
    if not isinstance(features, torch.Tensor) or features.shape != expected:
        found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(f"encode returned {found}, not a tensor of (images, patches, d_vision) = {expected}")
    return features


def _rows(decoded: Sequence[Decoded], features: torch.Tensor, dtype: str) -> list[Row]:
    """What is known of every image, now also whether its features are finite as they are stored."""
    import torch

    rows = [item.row for item in decoded]
    kept = features if dtype == "int8" else features.to(getattr(torch, dtype))
    for place in (~torch.isfinite(kept).flatten(1).all(1)).nonzero().flatten().tolist():
        finite = bool(torch.isfinite(features[place]).all())
        reason = f"features overflow {dtype}" if finite else "features are not finite"
        rows[place] = replace(rows[place], status=STATUS.index("not finite"), reason=reason)
    return rows


def _probe(encoder: LoadedEncoder, dtype: str) -> str:
    """SHA-256 of the features of one fixed picture: tells encoders apart that claim to be equal."""
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    picture = Image.fromarray(np.stack([ramp, ramp.T[::-1], 255 - ramp], -1))
    import torch

    with blamed(encoder, "extract.encoder"):
        features = _encoded(encoder, torch.from_numpy(encoder.preprocess(picture))[None])
    # A byte holds too little of one picture to tell encoders apart.
    exact = "bfloat16" if dtype == "int8" else dtype
    return hashlib.sha256(to_storage(features, exact).tobytes()).hexdigest()
