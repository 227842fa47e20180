"""Signatures behind a URL: they travel with their manifest or after it, if they fit it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import caches
import pytest
from conftest import digest
from test_handover import key, spoiled_signatures  # noqa: F401
from test_received import signed_at

from fedcmp.pipeline.cache.mirror import pull, push
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.receive import received
from fedcmp.pipeline.handover.signature import SIGNATURE, sign
from fedcmp.pipeline.handover.unpack import unpack
from fedcmp.pipeline.remote import Remote


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Path:  # noqa: F811
    """A cache that was received with a signature."""
    made = caches.write(tmp_path / "made/s.zarr", caches.features(10)).path
    return unpack(pack(made, tmp_path / "s.zip", key=key).path, tmp_path / "in/s.zarr").path


@pytest.fixture
def store(tmp_path: Path) -> Remote:
    return Remote(f"file://{tmp_path}/store/s.zarr")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where the store's files lie."""
    return tmp_path / "store/s.zarr"


def again(path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, year: int) -> bytes:  # noqa: F811
    """Another signature of the same cache."""
    with monkeypatch.context() as patch:
        signed_at(patch, f"{year}-01-01T00:00:00.000001+00:00")
        return sign((path / "manifest.json").read_bytes(), key, "s")


def test_a_signature_travels_with_its_cache(
    signed: Path,
    store: Remote,
    key: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert push(signed, store)
    copy = tmp_path / "copy/s.zarr"
    assert pull(store, copy)
    assert digest(copy) == digest(signed)
    assert received(copy, silo="s", trust=key.with_suffix(".pub")).images == 10
    assert not push(signed, store)
    assert not pull(store, copy)


def test_a_signature_follows_a_cache_that_is_there(
    signed: Path,
    store: Remote,
    there: Path,
    key: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Signed after it was sent and fetched; of two signatures the newer one stays."""
    signature, copy = (signed / SIGNATURE).read_bytes(), tmp_path / "copy/s.zarr"
    (signed / SIGNATURE).unlink()
    push(signed, store)
    pull(store, copy)
    assert not (copy / SIGNATURE).exists()
    with pytest.raises(UserError, match="it is not signed"):
        received(copy, silo="s", trust=key.with_suffix(".pub"))
    (signed / SIGNATURE).write_bytes(signature)
    sent: list[str] = []
    real = Remote.send
    monkeypatch.setattr(Remote, "send", lambda self, path: (sent.append(self.name), real(self, path))[1])
    assert push(signed, store)
    assert sent == [SIGNATURE]
    assert pull(store, copy)
    assert digest(copy) == digest(signed)
    assert received(copy, silo="s", trust=key.with_suffix(".pub")).images == 10
    assert capsys.readouterr().out.count("its signature") == 2

    older, newer = again(signed, key, monkeypatch, 2020), again(signed, key, monkeypatch, 2999)
    (signed / SIGNATURE).write_bytes(older)
    assert not push(signed, store)
    assert (there / SIGNATURE).read_bytes() == signature
    (there / SIGNATURE).write_bytes(older)
    assert not pull(store, copy)
    assert (copy / SIGNATURE).read_bytes() == signature
    (there / SIGNATURE).write_bytes(newer)
    assert pull(store, copy)
    assert (copy / SIGNATURE).read_bytes() == newer


def test_another_cache_takes_the_old_signature_away(signed: Path, store: Remote, there: Path) -> None:
    """With the new manifest there is never the old signature."""
    push(signed, store)
    other = caches.write(signed.parent.parent / "other/s.zarr", caches.features(7, seed=3)).path
    real, seen = Remote.send, []

    def watched(self: Remote, path: Path) -> None:
        if self.name == "manifest.json":
            seen.append((there / SIGNATURE).exists())
        real(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "send", watched)
        assert push(other, store)
    assert seen == [False]
    assert not (there / SIGNATURE).exists()


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_what_does_not_fit_is_not_taken_along(
    signed: Path,
    store: Remote,
    there: Path,
    key: Path,  # noqa: F811
    tmp_path: Path,
    number: int,
    direction: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether all files travel or none has to."""
    why, signature = list(spoiled_signatures(signed, key).items())[number]
    copy = tmp_path / "copy/s.zarr"
    place: dict[str, tuple[Path, Path, Callable[[], bool]]] = {
        "push": (signed / SIGNATURE, there / SIGNATURE, lambda: push(signed, store)),
        "pull": (there / SIGNATURE, copy / SIGNATURE, lambda: pull(store, copy)),
    }
    if direction == "pull":
        push(signed, store)
    spoiled, goal, move = place[direction]
    spoiled.write_bytes(signature)
    for moved in (True, False):
        assert move() is moved
        assert not goal.exists()
        said = " ".join(capsys.readouterr().out.split())
        assert f"{why.partition('#')[0]}" in said
        assert "and is not taken along" in said


def test_without_cryptography_nothing_is_taken_along_unchecked(
    signed: Path,
    store: Remote,
    there: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    assert push(signed, store)
    assert not (there / SIGNATURE).exists()
    assert "cannot be checked without cryptography" in " ".join(capsys.readouterr().out.split())


def test_a_signed_cache_is_not_replaced_by_an_unsigned_one(
    signed: Path, store: Remote, there: Path, tmp_path: Path
) -> None:
    """What the store lost is noticed."""
    push(signed, store)
    copy = tmp_path / "copy/s.zarr"
    pull(store, copy)
    assert received(copy, silo="s").images == 10
    shutil.rmtree(there)
    push(caches.write(tmp_path / "other/s.zarr", caches.features(7, seed=3)).path, store)
    pull(store, copy)
    with pytest.raises(UserError, match="not signed, but the cache that was here was signed"):
        received(copy, silo="s")
