"""Caches out of caches: a part of one, several in one, other texts for one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedcmp.pipeline.cache import (
    FeatureCache,
    Identity,
    Row,
    finish_commit,
    open_writer,
    partial_path,
    same_key,
    settling,
    writing,
)
from fedcmp.pipeline.cache.format import PATCHES, render_manifest, seal_manifest
from fedcmp.pipeline.cache.mark import remember_written
from fedcmp.pipeline.cache.tables import text_arrays
from fedcmp.pipeline.cache.writer import file_table, put_arrays
from fedcmp.pipeline.console import progress
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.handover.receive import received
from fedcmp.pipeline.hashes import fingerprint, sha256_file
from fedcmp.pipeline.records import KINDS, SPLITS, Text, caption, from_llava

Texts = Sequence[tuple[str, str, str]]
_TAKEN_OVER = ("probe", "made_by", "int8", "texts_left_out", "texts_from")


def rows(cache: FeatureCache) -> list[Row]:
    """What a cache says about each of its images."""
    offsets, data, kinds, splits = cache.text_arrays
    texts: list[list[tuple[str, str, str]]] = [[] for _ in range(cache.images)]
    for index, image in enumerate(cache.text_image.tolist()):
        content = data[int(offsets[index]) : int(offsets[index + 1])].decode()
        texts[image].append((KINDS[kinds[index]], SPLITS[splits[index]], content))
    reasons = iter(item["reason"] for item in cache.manifest["failures"])
    return [
        Row(
            name,
            bytes(digest).hex() if any(digest) else "",
            int(status),
            next(reasons) if status else "",
            tuple(mine),
        )
        for name, digest, status, mine in zip(
            cache.ids, cache.array("images/sha256"), cache.status, texts, strict=True
        )
    ]


def subset(
    cache: FeatureCache,
    out: Path,
    *,
    ids: Iterable[str] | None = None,
    split: str | None = None,
    number: int | None = None,
    seed: int = 0,
) -> FeatureCache:
    """Some images of a cache as a cache of its own, in their order; a killed run goes on by shard.

    Args:
        cache: The whole.
        out: Folder of the part.
        ids: Only these images.
        split: Only texts of this split, and images that have one.
        number: So many readable images, drawn at random.
        seed: Decides which.

    Raises:
        UserError: An id is unknown, or fewer images are left than asked for.
    """
    whole = rows(cache)
    chosen = np.arange(cache.images)
    if ids is not None:
        place = {name: index for index, name in enumerate(cache.ids)}
        wanted = set(ids)
        for name in sorted(wanted - place.keys())[:1]:
            raise UserError(f"{cache.path}: no image is called '{name}'{_nearest(name, place)}")
        chosen = np.array(sorted(place[name] for name in wanted), np.int64)
    if split is not None:
        chosen = np.array(
            [row for row in chosen if any(text[1] == split for text in whole[row].texts)], np.int64
        )
        whole = [
            Row(
                row.id,
                row.sha256,
                row.status,
                row.reason,
                tuple(text for text in row.texts if text[1] == split),
            )
            for row in whole
        ]
    if number is not None:
        readable = chosen[cache.status[chosen] == 0]
        if number > len(readable):
            raise UserError(
                f"{cache.path}: --number {number}, but only {len(readable)} readable images are left"
            )
        chosen = np.sort(np.random.default_rng(seed).permutation(readable)[:number])
    if not len(chosen):
        raise UserError(f"{cache.path}: no image is left; choose otherwise")
    source = {"name": "subset", "of": cache.content, "rows": fingerprint(chosen.tolist()), "split": split}
    return _write(out, [(cache, int(row), whole[row]) for row in chosen], source)


def merge(caches: dict[str, FeatureCache], out: Path, *, prefix: bool = False) -> FeatureCache:
    """Several caches of one encoder in one, in the order given; a killed run goes on by shard.

    Args:
        caches: By a name.
        out: Folder of the whole.
        prefix: Call an image `<name>/<id>`.

    Raises:
        UserError: Caches were encoded differently, or several images have one id.
    """
    same_key(caches)
    (first, reference), *others = caches.items()
    for name, cache in others:
        if (cache.patches, cache.d_vision) != (reference.patches, reference.d_vision):
            raise UserError(
                f"'{first}' and '{name}' have features of different shapes; do not use one of them"
            )
        ours, theirs = reference.quantiser, cache.quantiser
        if (
            ours
            and theirs
            and not (np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.step, theirs.step))
        ):
            raise UserError(f"'{first}' and '{name}' are int8 of different steps; keep them as two silos")
    members: list[tuple[FeatureCache, int, Row]] = []
    taken: dict[str, str] = {}
    for name, cache in caches.items():
        for index, row in enumerate(rows(cache)):
            id_ = f"{name}/{row.id}" if prefix else row.id
            if id_ in taken:
                raise UserError(
                    f"'{id_}' is an image of '{taken[id_]}' and of '{name}'; pass --prefix to keep both"
                )
            taken[id_] = name
            members.append((cache, index, Row(id_, row.sha256, row.status, row.reason, row.texts)))
    source = {"name": "merge", "of": [cache.content for cache in caches.values()], "prefix": prefix}
    return _write(out, members, source | ({"names": list(caches)} if prefix else {}))


def _write(
    out: Path, members: Sequence[tuple[FeatureCache, int, Row]], source: dict[str, Any]
) -> FeatureCache:
    reference = members[0][0]
    manifest = reference.manifest
    identity = Identity(manifest["key"], source)
    out.parent.mkdir(parents=True, exist_ok=True)
    layout = {"patches": reference.patches, "d_vision": reference.d_vision, "dtype": manifest["dtype"]}
    step = manifest["shard_images"]
    with settling(out):
        finish_commit(out)
    if out.exists():
        made = FeatureCache(out)
        if made.manifest["source"] == source:
            return made
        raise UserError(f"{out}: another cache is there; give another folder")
    with (
        open_writer(out, identity, together=False, **layout, shard_images=step) as writer,
        progress(out.stem, len(members), "images") as task,
    ):
        assert writer is not None
        if (quantiser := reference.quantiser) is not None:
            writer.calibrate(lambda: quantiser)
        for shard, start in enumerate(range(0, len(members), step)):
            part = members[start : start + step]
            if writer.finished(shard) is None:
                writer.write(shard, _features(part), [row for _, _, row in part])
            task.advance(len(part))
        taken = {name: manifest[name] for name in _TAKEN_OVER if name in manifest}
        licences = sorted({each.manifest.get("licence", "") for each, _, _ in members} - {""})
        if licences:
            taken["licence"] = "; ".join(licences)
        return writer.commit({"silo": out.stem, "skipped": [], **taken})


def _features(part: Sequence[tuple[FeatureCache, int, Row]]) -> np.ndarray:
    cache = part[0][0]
    features = np.zeros((len(part), cache.patches, cache.d_vision), cache.dtype)
    for place, (source, index, row) in enumerate(part):
        if row.status == 0:
            source.read([index], features[place : place + 1])
    return features


def replace_texts(path: Path, listing: Path) -> FeatureCache:
    """Give a cache other texts; its features are neither read nor written.

    Args:
        path: The cache's folder.
        listing: JSON lines with `image`, the id, and `caption` or LLaVA's `conversations`; `split` is
            `train` where it is not given.

    Raises:
        UserError: A line cannot be read or is about an unknown image.
    """
    with writing(path):
        finish_commit(path)
        cache = received(path)
        texts = _read_texts(listing, cache)
        partial = partial_path(path)
        shutil.rmtree(partial, ignore_errors=True)
        for name in cache.manifest["files"]:
            if not name.startswith("texts/"):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                # Only shards are shared: zarr-python writes into the group's own file again.
                bring = _link if name.startswith(f"{PATCHES}/c/") else shutil.copyfile
                bring(path / name, partial / name)
        source = {"texts_from": {"name": listing.name, "sha256": sha256_file(listing)}}
        manifest = with_texts(cache, partial, texts, source)
        write_atomic(partial / "manifest.json", render_manifest(manifest))
        finish_commit(path)
        remember_written(path)
    return FeatureCache(path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def with_texts(
    cache: FeatureCache, folder: Path, texts: Sequence[Texts], more: dict[str, Any]
) -> dict[str, Any]:
    """Write arrays of other texts into a folder; the manifest that goes with them."""
    put_arrays(folder, text_arrays(texts))
    old = cache.manifest
    kept = {name: entry for name, entry in old["files"].items() if not name.startswith("texts/")}
    new = file_table(folder, {name: digest for name, (_, digest) in kept.items()})
    files = kept | {name: entry for name, entry in new.items() if name.startswith("texts/")}
    body = {key: value for key, value in old.items() if key not in ("files", "texts_left_out", "texts_from")}
    body |= {"texts": sum(map(len, texts)), **more, "files": dict(sorted(files.items()))}
    return seal_manifest(body)


def _read_texts(listing: Path, cache: FeatureCache) -> list[list[tuple[str, str, str]]]:
    place = {name: index for index, name in enumerate(cache.ids)}
    texts: list[list[tuple[str, str, str]]] = [[] for _ in place]
    for number, line in enumerate(_lines(listing), 1):
        if not line.strip():
            continue
        try:
            image, text = _read_text(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{listing}:{number}: not a text about an image: {error}") from None
        if image not in place:
            raise UserError(f"{listing}:{number}: no image is called '{image}'{_nearest(image, place)}")
        texts[place[image]].append((text.kind, text.split, text.encode().decode()))
    if not any(texts):
        raise UserError(f"{listing}: there is no text in it; to leave texts out, pack with --no-text")
    return texts


def _lines(listing: Path) -> Iterator[str]:
    try:
        with listing.open(encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{listing}: {error.strerror}; give JSON lines") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{listing}: not UTF-8 ({error.reason})") from None


def _read_text(entry: dict[str, Any]) -> tuple[str, Text]:
    split = entry.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"split '{split}' is none of {', '.join(SPLITS)}")
    if "conversations" in entry:
        return str(entry["image"]), from_llava(entry["conversations"], split)
    if not isinstance(entry["caption"], str) or not entry["caption"].strip():
        raise ValueError("its caption is empty")
    return str(entry["image"]), caption(entry["caption"], split)


def _nearest(name: str, known: dict[str, int]) -> str:
    return did_you_mean(name, known) if len(known) <= 1000 else "; see 'fedcmp cache inspect'"
