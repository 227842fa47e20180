"""`fedcmp cache`: inspect, verify and hand over feature caches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_SHOWN = 20
_OLDER = click.option(
    "--allow-older", is_flag=True, help="Accept a cache that was signed before the one that was here."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


@click.group()
def cache() -> None:
    """Inspect, verify and hand over feature caches.

    \b
    Example:
      fedcmp cache ls build/features
      fedcmp cache pack build/features/berlin.zarr --out berlin.zip --sign me
      fedcmp cache unpack berlin.zip --to build/features --trust berlin.pub
    """


@cache.command()
@click.argument("places", type=_PATH, nargs=-1, required=True)
@_JSON
def ls(places: tuple[Path, ...], as_json: bool) -> None:
    """List caches, or all caches in folders.

    \b
    Example:
      fedcmp cache ls build/features
    """
    from fedcmp.pipeline.cache.inspect import found, summary
    from fedcmp.pipeline.console import table

    summaries = [summary(path) for path in found(places)]
    if as_json:
        _print(summaries)
        return
    table(
        "Feature caches",
        ["silo", "images", "failed", "texts", "MB", "shape", "dtype", "encoder", "key"],
        [
            [
                each["silo"],
                f"{each['images']:,}",
                f"{each['failed']:,}",
                f"{each['texts']:,}",
                f"{each['bytes'] / 1e6:,.1f}",
                " x ".join(map(str, each["shape"])),
                each["dtype"],
                each["encoder"],
                each["key"][:8],
            ]
            for each in summaries
        ],
    )


@cache.command()
@click.argument("path", type=_PATH)
@click.option("--sample", default=64, show_default=True, help="Images to compute statistics of.")
@click.option("--texts", default=3, show_default=True, help="Texts to show.")
@_JSON
def inspect(path: Path, sample: int, texts: int, as_json: bool) -> None:
    """Show what made a cache, how its features are spread, and some texts.

    \b
    Example:
      fedcmp cache inspect build/features/flat.zarr
    """
    from fedcmp.pipeline.cache.inspect import inspection
    from fedcmp.pipeline.console import say

    seen = inspection(path, sample=sample, texts=texts)
    if as_json:
        _print(seen)
        return
    features = seen["features"]
    for name in ("images", "texts", "status", "splits", "kinds", "shape", "dtype", "encoder"):
        say(_plain(f"{name}: {_readable(seen[name])}"))
    say(f"cache key: {seen['key']}")
    say(f"manifest's SHA-256: {seen['manifest_sha256']}")
    if seen["licence"]:
        say(_plain(f"licence: {seen['licence']}"))
    if seen["int8"]:
        say(f"int8: {_readable(seen['int8'])}")
    for group, value in seen["made_from"].items():
        say(f"{group}: {json.dumps(value, ensure_ascii=False)[:2000]}")
    say(
        f"features of {features['images']} images: mean {features['mean']:.3g}, std {features['std']:.3g}, "
        f"from {features['smallest']:.3g} to {features['largest']:.3g}, {features['not_finite']} not finite, "
        f"{features['zero_images']} images all zero, largest in channels "
        f"{', '.join(map(str, features['outlier_channels']))}"
    )
    edges, counts = features["histogram"]["edges"], features["histogram"]["counts"]
    for low, count in zip(edges, counts, strict=False):
        say(f"{low:10.3f} {'█' * round(50 * count / max(max(counts), 1))} {count}")
    for text in seen["sample_texts"]:
        say(_plain(f"{text['image']}: {' / '.join(content for _, content in text['turns'])}"))


@cache.command()
@click.argument("paths", type=_PATH, nargs=-1, required=True)
@_OLDER
@_JSON
def verify(paths: tuple[Path, ...], allow_older: bool, as_json: bool) -> None:
    """Check every byte of caches: hashes, checksums, structure, shapes, NaN; exit code 1 if one is bad.

    A cache that passes is not verified again before it is used.

    \b
    Example:
      fedcmp cache verify build/features/flat.zarr
      fedcmp cache verify --json flat.zarr.zip
    """
    from fedcmp.pipeline.console import progress, say
    from fedcmp.pipeline.handover.receive import examine

    results = []
    for path in paths:
        with progress(f"verify {path.stem}", None, "files") as task:
            problems = examine(path, task.advance, allow_older=allow_older)
        results.append(
            {"path": str(path), "ok": not problems, "problems": [each.as_json() for each in problems]}
        )
        if not as_json:
            for problem in problems[:_SHOWN]:
                say(_plain(f"{path}: {problem}"))
            if len(problems) > _SHOWN:
                say(f"  and {len(problems) - _SHOWN} more")
            say(f"{path}: {f'{len(problems)} problems, do not use it' if problems else 'whole and sound'}")
    if as_json:
        _print(results)
    if not all(result["ok"] for result in results):
        click.get_current_context().exit(1)


@cache.command()
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@_JSON
def diff(first: Path, second: Path, as_json: bool) -> None:
    """List the fields and files in which two caches differ; exit code 1 if they do.

    Caches that differ in their key cannot be trained on together.

    \b
    Example:
      fedcmp cache diff ours/flat.zarr theirs/flat.zarr
    """
    from fedcmp.pipeline.cache.inspect import difference
    from fedcmp.pipeline.console import say

    found = difference(first, second)
    if as_json:
        _print(found)
    else:
        for group, entries in found.items():
            for entry in entries[:_SHOWN]:
                say(_plain(f"{group}: {entry}"))
            if len(entries) > _SHOWN:
                say(f"{group}: and {len(entries) - _SHOWN} more")
        if not any(found.values()):
            say("They are equal.")
    if any(found.values()):
        click.get_current_context().exit(1)


@cache.command()
@click.argument("path", type=_PATH)
@click.option("--out", type=_PATH, help="File to write; by default CACHE.zip or CACHE.h5 in this folder.")
@click.option("--hdf5", is_flag=True, help="Write HDF5 with contiguous datasets instead of a zip.")
@click.option(
    "--zstd", is_flag=True, help="Compress: about a fifth smaller, but must be unpacked to be read."
)
@click.option("--no-text", is_flag=True, help="Leave the texts out.")
@click.option("--sign", "key", type=_PATH, metavar="KEY", help="Sign with an ed25519 private key.")
@click.option("--silo", metavar="NAME", help="Sign it as this silo's; by default the folder's name.")
@click.option("--overwrite", is_flag=True, help="Replace the file that is there.")
@_JSON
def pack(
    path: Path,
    out: Path | None,
    hdf5: bool,
    zstd: bool,
    no_text: bool,
    key: Path | None,
    silo: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Pack a cache into one file to hand over, checking its hashes on the way.

    \b
    Example:
      fedcmp cache pack build/features/berlin.zarr
      fedcmp cache pack build/features/berlin.zarr --out berlin.zip --zstd --no-text --sign me
    """
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.handover.pack import pack as write

    out = out or Path(f"{path.name}.{'h5' if hdf5 else 'zip'}")
    form = {"hdf5": hdf5, "zstd": zstd, "texts": not no_text}
    packed = write(path, out, **form, key=key, silo=silo, overwrite=overwrite)
    if as_json:
        _print(
            {
                "path": str(out),
                "bytes": packed.size,
                "manifest_sha256": packed.manifest,
                "signed": packed.signed,
                "signature_left_out": packed.left_out,
            }
        )
        return
    signed = "not signed" if not packed.signed else "signed" if key else "signed as it came"
    say(f"{out}: {packed.size / 1e6:,.1f} MB, {signed}")
    if packed.left_out is not None:
        say(f"The cache came signed, and goes without: {packed.left_out}; sign it with --sign.")
    say(f"Manifest's SHA-256, to compare on the phone: {_spoken(packed.manifest)}")
    texts = f", {packed.texts:,} texts" if packed.texts else ""
    say(
        f"It holds image names, hashes of the image files, where they came from{texts}, and features from "
        "which pictures can be redrawn roughly: hand it only to people you would show the pictures "
        "(docs/reveals.md)."
    )


@cache.command()
@click.argument("packed", type=_PATH)
@click.option(
    "--to", type=_PATH, default=Path("."), help="Folder that the cache is put into; here by default."
)
@click.option("--name", help="Silo's name; by default that of the file.")
@click.option("--trust", type=_PATH, metavar="KEY", help="Public key that must have signed it.")
@click.option("--expect", metavar="SHA256", help="Hash that its manifest must have.")
@click.option("--overwrite", is_flag=True, help="Replace the cache that is there.")
@_OLDER
@_JSON
def unpack(
    packed: Path,
    to: Path,
    name: str | None,
    trust: Path | None,
    expect: str | None,
    overwrite: bool,
    allow_older: bool,
    as_json: bool,
) -> None:
    """Verify a packed cache and put it into a folder; a damaged or hostile one leaves nothing there.

    \b
    Example:
      fedcmp cache unpack berlin.zip --to build/features --trust berlin.pub
    """
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.handover.unpack import unpack as receive

    silo = name or packed.name.removesuffix(".zip").removesuffix(".h5").removesuffix(".zarr")
    if not silo or Path(silo).name != silo or silo.startswith("."):
        raise UserError(f"--name {silo}: expected a plain name such as berlin")
    received = receive(
        packed,
        to / f"{silo}.zarr",
        trust=trust,
        expect=expect,
        overwrite=overwrite,
        allow_older=allow_older,
    )
    if as_json:
        _print({"path": str(received.path), "manifest_sha256": received.manifest, "images": received.images})
        return
    say(f"{received.path}: {received.images:,} images, {received.texts:,} texts, every byte verified")
    say(f"Manifest's SHA-256, to compare on the phone: {_spoken(received.manifest)}")
    if trust is None and expect is None:
        signed = "a signature that was not checked (--trust)" if received.signed else "no signature"
        say(f"It has {signed}: hashes find damage, not a forger; compare the SHA-256 with the sender.")


@cache.command()
@click.argument("path", type=_PATH)
@click.option("--out", type=_PATH, required=True, help="Folder of the new cache.")
@click.option("--ids", type=click.File(encoding="utf-8-sig"), help="File with one image id a line.")
@click.option("--split", help="Only texts of this split, and images that have one.")
@click.option("--number", type=click.IntRange(min=1), help="This many readable images, drawn at random.")
@click.option("--seed", default=0, show_default=True, help="Seed of that draw.")
def subset(path: Path, out: Path, ids: Any, split: str | None, number: int | None, seed: int) -> None:
    """Make a cache of some of a cache's images.

    \b
    Example:
      fedcmp cache subset flat.zarr --out small.zarr --number 1000
      fedcmp cache subset flat.zarr --out consented.zarr --ids consented.txt
    """
    from fedcmp.pipeline.cache.derive import subset as choose
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.handover.receive import received
    from fedcmp.pipeline.records import SPLITS

    if ids is None and split is None and number is None:
        raise UserError("pass --ids, --split or --number")
    if split is not None and split not in SPLITS:
        raise UserError(f"--split {split}: expected {', '.join(SPLITS)}")
    names = None if ids is None else [line.rstrip("\r\n") for line in ids if line.strip()]
    made = choose(received(path), out, ids=names, split=split, number=number, seed=seed)
    say(f"{out}: {made.images:,} images, {made.texts:,} texts")


@cache.command()
@click.argument("path", type=_PATH)
@click.argument("listing", type=_PATH)
def texts(path: Path, listing: Path) -> None:
    """Give a cache other texts, without touching its features.

    LISTING is JSON lines with `image`, the id, and `caption` or LLaVA's `conversations`.

    \b
    Example:
      fedcmp cache texts build/features/flat.zarr better_captions.jsonl
    """
    from fedcmp.pipeline.cache.derive import replace_texts
    from fedcmp.pipeline.console import say

    made = replace_texts(path, listing)
    say(f"{path}: {made.texts:,} texts about {made.images:,} images")


@cache.command()
@click.argument("paths", type=_PATH, nargs=-1, required=True)
@click.option("--out", type=_PATH, required=True, help="Folder of the new cache.")
@click.option("--prefix", is_flag=True, help="Name images SILO/ID, so that equal ids do not collide.")
def merge(paths: tuple[Path, ...], out: Path, prefix: bool) -> None:
    """Join caches made with one encoder.

    \b
    Example:
      fedcmp cache merge flat.zarr neon.zarr --out both.zarr --prefix
    """
    from fedcmp.pipeline.cache.derive import merge as join
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.handover.receive import received

    names = [path.name.removesuffix(".zip").removesuffix(".zarr") for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"two caches are called the same among {', '.join(names)}; rename one")
    caches = {name: received(path) for name, path in zip(names, paths, strict=True)}
    made = join(caches, out, prefix=prefix)
    say(f"{out}: {made.images:,} images, {made.texts:,} texts")


def _print(value: Any) -> None:
    # Names from elsewhere: no control character among them reaches a terminal.
    click.echo(json.dumps(value, indent=2, ensure_ascii=sys.stdout.isatty()))


def _spoken(digest: str) -> str:
    return " ".join(digest[start : start + 8] for start in range(0, len(digest), 8))


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(text: str) -> str:
    """Without control characters, which a stranger's names and texts may hold."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
