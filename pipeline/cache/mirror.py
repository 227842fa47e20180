"""Feature caches behind a URL: sent file by file with the manifest last, fetched and verified.

A signature travels with its manifest, and alone where the manifest is there already.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from fedcmp.pipeline.console import progress, say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked, read_json, replace_directory, write_atomic, write_json
from fedcmp.pipeline.handover.signature import SIGNATURE, SIGNATURE_LIMIT, claim_of, misfit
from fedcmp.pipeline.hashes import sha256_file
from fedcmp.pipeline.remote import Remote

_SHA256 = re.compile(r"[0-9a-f]{64}")


def remote_manifest(remote: Remote) -> dict[str, Any] | None:
    """The manifest of a cache behind a URL, None where there is no whole cache.

    Raises:
        UserError: It is no manifest, or names files outside the cache.
    """
    data = _manifest_bytes(remote)
    return None if data is None else _parsed(remote, data)


def pull(remote: Remote, path: Path) -> bool:
    """Make a local cache equal to the one behind a URL; a killed one goes on where it stopped.

    Args:
        remote: The cache's folder; where there is no whole cache, nothing is done.
        path: The local cache.

    Returns:
        Whether anything was fetched.

    Raises:
        UserError: A file is not what the manifest says.
    """
    data = _manifest_bytes(remote)
    if data is None:
        return False
    signature = _signature(remote, data)
    if _is_copy(path, data, manifest := _parsed(remote, data)):
        if signature is None or not _is_newer(signature, _signature(path, data)):
            return False
        with locked(_lock(path), str(path), wait=True):
            write_atomic(path / SIGNATURE, signature)
        say(f"{path.stem}: fetched its signature from {remote}")
        return True
    if _sent(path).exists() and (path / "manifest.json").is_file():
        raise UserError(
            f"{path}: not yet sent to {remote}, where another cache is; run 'fedcmp extract' again"
        )
    with locked(_lock(path), str(path), wait=True):
        if _is_copy(path, data, manifest):
            return False
        incoming = path.with_name(path.name + ".incoming")
        files = manifest["files"]
        if incoming.exists():
            _drop_others(incoming, set(files))
        there = remote.listing()
        with progress(f"fetch {path.stem}", len(files), "files") as task:
            for name, (size, digest) in files.items():
                if there.get(name, (None, ""))[0] != size:
                    raise UserError(f"{remote / name}: missing or not {size} bytes long; have it sent again")
                _fetch(remote / name, incoming / name, size, digest)
                task.advance()
        if signature is not None:
            write_atomic(incoming / SIGNATURE, signature)
        write_atomic(incoming / "manifest.json", data)
        replace_directory(incoming, path)
    say(f"{path.stem}: fetched {len(files)} files from {remote}, every checksum right")
    return True


def push(path: Path, remote: Remote) -> bool:
    """Send a whole local cache to a URL; a killed one goes on where it stopped.

    The manifest there is removed first and sent last, so that readers never take a mixture for whole.

    Returns:
        Whether anything was sent.
    """
    to_be_sent(path)
    data, progress_file = (path / "manifest.json").read_bytes(), _sent(path)
    signature = _signature(path, data)
    files = _parsed(path, data)["files"]
    with locked(_lock(path), str(path), wait=True):
        if _manifest_bytes(remote) == data:
            progress_file.unlink(missing_ok=True)
            if signature is None or not _is_newer(signature, _signature(remote, data)):
                return False
            (remote / SIGNATURE).send(path / SIGNATURE)
            say(f"{path.stem}: sent its signature to {remote}")
            return True
        (remote / "manifest.json").delete()
        there = remote.listing()
        sent = read_json(progress_file) or {}
        with progress(f"send {path.stem}", len(files), "files") as task:
            for name, (_, digest) in files.items():
                known = there.get(name)
                if known is None or sent.get(name) != [str(remote), digest, *known]:
                    (remote / name).send(path / name)
                    sent[name] = [str(remote), digest, *((remote / name).facts() or ())]
                    write_json(progress_file, sent)
                task.advance()
        for name in there.keys() - files.keys():
            (remote / name).delete()
        if signature is not None:
            (remote / SIGNATURE).send(path / SIGNATURE)
        (remote / "manifest.json").send(path / "manifest.json")
        progress_file.unlink(missing_ok=True)
    say(f"{path.stem}: sent {len(files)} files to {remote}")
    return True


def to_be_sent(path: Path) -> None:
    """From now on the local cache counts as newer than the one behind the URL, until it is sent."""
    if not _sent(path).exists():
        write_json(_sent(path), {})


def _sent(path: Path) -> Path:
    """What has been sent so far."""
    return path.with_name(f".{path.name}.sent.json")


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.mirror.lock")


def _signature(place: Remote | Path, manifest: bytes) -> bytes | None:
    """The signature that lies there and fits a manifest; one that does not is said, and goes nowhere."""
    file = place / SIGNATURE
    try:
        with file.open() if isinstance(file, Remote) else file.open("rb") as stream:
            signature = stream.read(SIGNATURE_LIMIT + 1)
    except FileNotFoundError:
        return None
    why = misfit(manifest, signature)
    if why is None:
        return signature
    say(f"{place}: {why}, and is not taken along; have the cache signed again, or remove {SIGNATURE} there")
    return None


def _is_newer(one: bytes, other: bytes | None) -> bool:
    first, second = claim_of(one), claim_of(other)
    return first is not None and (second is None or first.time > second.time)


def _manifest_bytes(remote: Remote) -> bytes | None:
    try:
        return (remote / "manifest.json").read_bytes()
    except FileNotFoundError:
        return None


def _parsed(place: Remote | Path, data: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
        files = manifest["files"].items()
        wrong = [name for name, (size, digest) in files if not _is_entry(name, size, digest)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: its manifest.json is none of a feature cache ({error})") from None
    if wrong:
        raise UserError(f"{place}: its manifest lists {wrong[0]!r}, which no cache has; do not use it")
    return dict(manifest)


def _is_entry(name: str, size: object, digest: object) -> bool:
    parts = PurePosixPath(name).parts
    inside = bool(parts) and not name.startswith("/") and not {"..", "."} & set(name.split("/"))
    plain = "\\" not in name and "\0" not in name and name != "manifest.json"
    return (
        inside
        and plain
        and isinstance(size, int)
        and size >= 0
        and isinstance(digest, str)
        and _SHA256.fullmatch(digest) is not None
    )


def _is_copy(path: Path, data: bytes, manifest: dict[str, Any]) -> bool:
    try:
        if (path / "manifest.json").read_bytes() != data:
            return False
        return all((path / name).stat().st_size == size for name, (size, _) in manifest["files"].items())
    except FileNotFoundError:
        return False


def _drop_others(folder: Path, wanted: set[str]) -> None:
    for file in folder.rglob("*"):
        if file.is_symlink() or (file.is_file() and str(file.relative_to(folder)) not in wanted):
            file.unlink()


def _fetch(remote: Remote, target: Path, size: int, digest: str) -> None:
    if target.is_file() and target.stat().st_size == size and sha256_file(target) == digest:
        return
    if target.is_dir():
        shutil.rmtree(target)
    remote.fetch(target)
    if target.stat().st_size != size or sha256_file(target) != digest:
        target.unlink()
        raise UserError(f"{remote}: its SHA-256 is not the manifest's; have the cache sent again")
