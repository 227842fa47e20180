"""A cache is verified wholly before it is used for the first time here, and so is whatever changed since.

The crc32c of a row, checked when it is read, detects damage only: whoever changes a text can recompute
it. Only the manifest's SHA-256 of every file detects that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from fedcmp.pipeline.cache import CorruptCacheError, FeatureCache
from fedcmp.pipeline.cache.files import open_files
from fedcmp.pipeline.cache.format import MANIFEST_LIMIT
from fedcmp.pipeline.cache.mark import Mark, remember, remembered, stamps
from fedcmp.pipeline.cache.verify import Problem, verify
from fedcmp.pipeline.console import progress, say
from fedcmp.pipeline.handover.signature import (
    SIGNATURE,
    SIGNATURE_LIMIT,
    Claim,
    claim_of,
    require_newer,
    require_silo,
    require_trusted,
)


def received(path: Path, *, silo: str | None = None, trust: Path | None = None) -> FeatureCache:
    """Open a cache to use it; it is verified unless that was done before and nothing changed since.

    Args:
        path: The cache's folder, or a stored zip of it.
        silo: What it has to be; anything where it is None.
        trust: Public key that must have signed it as this silo.

    Raises:
        UserError: It does not exist, is not signed as it should be, or is older than what was here before.
        CorruptCacheError: Anything about it is not as its manifest says.
    """
    cache = FeatureCache(path)
    manifest, signature = _signed(path)
    claim = claim_of(signature)
    if trust is not None and silo is not None:
        claim = require_trusted(manifest, signature, trust, silo, str(path))
    elif claim is not None and silo is not None:
        require_silo(claim, silo, str(path))
    mark, digest = remembered(path), hashlib.sha256(manifest).hexdigest()
    if mark is not None and (mark.manifest, mark.stamps) == (digest, stamps(path)):
        return cache
    if mark is None or mark.manifest != digest:
        require_newer(claim, last_claim(path), str(path))
    files = cache.manifest["files"]
    megabytes = sum(size for size, _ in files.values()) / 1e6
    say(f"{path}: not used before as it is now; verifying {len(files):,} files, {megabytes:,.1f} MB")
    with progress(f"verify {path.stem}", len(files), "files") as task:
        problems = examine(path, task.advance)
    if problems:
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        raise CorruptCacheError(
            f"{path}: {problems[0]}{more}; do not use it, have it sent again or extract it with --overwrite"
        )
    return cache


def examine(
    path: Path, advance: Callable[[int], None] = lambda files: None, *, allow_older: bool = False
) -> list[Problem]:
    """Verify a cache, and remember it where nothing is wrong.

    Args:
        path: The cache's folder, or a stored zip of it.
        advance: Called with the number of files that were checked.
        allow_older: Accept it although a newer one was here; that one is forgotten.

    Raises:
        UserError: There is no cache, or it is older than what was here before.
    """
    before = stamps(path) if path.exists() else ""
    problems = verify(path, advance)
    if problems:
        return problems
    manifest, signature = _signed(path)
    if stamps(path) != before:
        return [Problem("manifest.json", "it or another file changed while it was verified")]
    claim, last, digest = claim_of(signature), last_claim(path), hashlib.sha256(manifest).hexdigest()
    mark = remembered(path)
    if not allow_older and (mark is None or mark.manifest != digest):
        require_newer(claim, last, str(path))
    newest = claim if allow_older else max(filter(None, (claim, last)), key=attrgetter("time"), default=None)
    try:
        remember(path, Mark(digest, before, newest.plain() if newest else None))
    except OSError as error:
        say(f"{path}: verified, but that cannot be remembered beside it ({error.strerror})")
    return []


def last_claim(path: Path) -> Claim | None:
    """Silo and time of the newest signature that was accepted at a path."""
    mark = remembered(path)
    return Claim.of(mark.signed) if mark is not None else None


def _signed(path: Path) -> tuple[bytes, bytes | None]:
    """Bytes of the manifest, and of its signature if it has one."""
    files = open_files(path)
    signature = files.read(SIGNATURE, SIGNATURE_LIMIT) if files.size(SIGNATURE) is not None else None
    return files.read("manifest.json", MANIFEST_LIMIT), signature
