"""What came from elsewhere is verified wholly before it is used, once, and only as what it was signed as."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import caches
import numpy as np
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedcmp.cli import main
from fedcmp.pipeline.cache import CorruptCacheError, FeatureCache
from fedcmp.pipeline.cache.derive import replace_texts
from fedcmp.pipeline.cache.files import StoredZip
from fedcmp.pipeline.cache.format import crc, crc_bytes
from fedcmp.pipeline.cache.mark import remembered
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover import receive, signature
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.receive import received
from fedcmp.pipeline.handover.unpack import unpack


def run(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def new_key(place: Path) -> Path:
    private = Ed25519PrivateKey.generate()
    pem, plain = form.Encoding.PEM, form.NoEncryption()
    place.write_bytes(private.private_bytes(pem, form.PrivateFormat.OpenSSH, plain))
    public = private.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    place.with_suffix(".pub").write_bytes(public)
    return place


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_key(tmp_path / "me")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The sender's cache of silo berlin."""
    return caches.write(tmp_path / "sender" / "berlin.zarr", caches.features(10), failed=(3, 5)).path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Caches that were verified, in their order."""
    seen: list[Path] = []
    real = receive.verify

    def counted(path: Path, *rest: object) -> object:
        seen.append(path)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(receive, "verify", counted)
    return seen


def forged(place: Path, old: bytes = b"Bild 1", new: bytes = b"Mord 1") -> None:
    """Change a text as a forger does: its checksum fits again, sizes and manifest stay as they are."""
    name = "texts/bytes/c/0"
    file = place / name if place.is_dir() else place
    data = bytearray(file.read_bytes())
    start, size = (0, len(data)) if file is not place else StoredZip(place).place(name)
    at = data.index(old, start)
    data[at : at + len(new)] = new
    data[start + size - 4 : start + size] = crc_bytes(crc(bytes(data[start : start + size - 4])))
    file.write_bytes(data)


FORMS = ["zip", "folder"]


def arrive(path: Path, to: Path, kind: str) -> Path:
    """A cache as somebody else puts it beside ours, without `fedcmp cache unpack`."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        shutil.copytree(path, to)
        return to
    return pack(path, to.with_name(f"{to.name}.zip")).path


@pytest.mark.parametrize("kind", FORMS)
def test_verified_once(tmp_path: Path, path: Path, kind: str, hashed: list[Path]) -> None:
    place = arrive(path, tmp_path / "features/berlin.zarr", kind)
    first = received(place)
    again = received(place)
    assert hashed == [place]
    np.testing.assert_array_equal(first.read([0, 9]), again.read([0, 9]))
    assert sorted(os.listdir(place.parent)) == sorted([".berlin.zarr.verified.json", place.name])


def test_what_was_written_here_is_not_hashed_again(
    tmp_path: Path, path: Path, key: Path, hashed: list[Path]
) -> None:
    received(path)
    unpack(pack(path, tmp_path / "p", key=key).path, tmp_path / "in/berlin.zarr")
    received(tmp_path / "in/berlin.zarr", silo="berlin", trust=key.with_suffix(".pub"))
    listing = tmp_path / "texts.jsonl"
    listing.write_text(json.dumps({"image": "é1.png", "caption": "neu"}))
    replace_texts(path, listing)
    received(path)
    assert hashed == []


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("seen", [False, True])
def test_changed_text_is_never_used(
    tmp_path: Path, path: Path, kind: str, seen: bool, hashed: list[Path]
) -> None:
    place = arrive(path, tmp_path / "features/berlin.zarr", kind)
    if seen:
        received(place)
    forged(place)
    assert FeatureCache(place).text(0).turns[0].content == "Mord 1"
    for _ in range(2):
        with pytest.raises(CorruptCacheError, match="texts/bytes/c/0") as caught:
            received(place)
        assert "\n" not in str(caught.value)
    assert len(hashed) == 2 + seen


@pytest.mark.parametrize("kind", FORMS)
def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path, path: Path, kind: str) -> None:
    place = arrive(path, tmp_path / "features/berlin.zarr", kind)
    received(place)
    file = place / "texts/bytes/c/0" if kind == "folder" else place
    before = file.stat()
    forged(place)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(CorruptCacheError, match="texts/bytes"):
        received(place)


@pytest.mark.parametrize("kind", FORMS)
def test_a_mark_that_came_along_fits_nothing(tmp_path: Path, path: Path, kind: str) -> None:
    place = arrive(path, tmp_path / "theirs/berlin.zarr", kind)
    received(place)
    forged(place)
    shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(CorruptCacheError):
        received(tmp_path / "ours" / place.name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 60_000, b'{"manifest": 1, "stamps": {}, "signed": [1]}', b"\xff"]
)
def test_a_broken_mark_is_none(tmp_path: Path, path: Path, content: bytes, hashed: list[Path]) -> None:
    (path.parent / ".berlin.zarr.verified.json").write_bytes(content)
    received(path)
    received(path)
    assert hashed == [path]


def test_a_folder_that_cannot_be_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    (path.parent / ".berlin.zarr.verified.json").unlink()
    monkeypatch.setattr(receive, "remember", read_only)
    assert received(path).images == 10
    assert "cannot be remembered beside it (Read-only file system)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", FORMS)
def test_a_forged_partner_is_not_trained_on(extracted: Path, tmp_path: Path, kind: str) -> None:
    """Through the command: the cache of a silo that nobody here extracted."""
    features = tmp_path / "features"
    shutil.copytree(extracted.parent / "features", features)
    shutil.copytree(features / "lab.zarr", tmp_path / "sender/partner.zarr")
    place = arrive(tmp_path / "sender/partner.zarr", features / "partner.zarr", kind)
    options = [
        f"features={features}",
        'federate.silos=["partner"]',
        "federate.rounds=1",
        f"build={tmp_path}/b",
    ]
    words = ["federate", extracted, *(part for each in options for part in ("--set", each))]
    good = run(*words)
    assert good.exit_code == 0, good.output
    assert "not used before as it is now; verifying" in good.output
    assert "not used before" not in run(*words, "--set", "run=again").output
    forged(place, b"Hunde", b"Morde")
    bad = run(*words, "--set", "run=bad")
    assert (bad.exit_code, "its SHA-256 is not the manifest" in bad.output) == (2, True), bad.output
    assert not (tmp_path / "b/runs/study/bad/manifest.json").exists()


@pytest.mark.parametrize("words", [{}, {"zstd": True}, {"hdf5": True}], ids=str)
def test_one_silos_cache_is_not_anothers(
    tmp_path: Path, path: Path, key: Path, words: dict[str, bool]
) -> None:
    packed = pack(path, tmp_path / "p", key=key, **words).path
    for trust in (None, key.with_suffix(".pub")):
        with pytest.raises(UserError, match="signed as silo 'berlin', not as 'lyon'"):
            unpack(packed, tmp_path / "in/lyon.zarr", trust=trust)
    assert not (tmp_path / "in").exists()
    other = pack(path, tmp_path / "o", key=key, silo="lyon", **words).path
    assert unpack(other, tmp_path / "in/lyon.zarr", trust=key.with_suffix(".pub")).signed


def signed_at(monkeypatch: pytest.MonkeyPatch, time: str) -> None:
    class Clock(signature.datetime):  # type: ignore[name-defined, misc]
        @classmethod
        def now(cls, zone: object = None) -> object:
            return cls.fromisoformat(time)

    monkeypatch.setattr(signature, "datetime", Clock)


def two(tmp_path: Path, path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An older and a newer cache of one silo, both signed."""
    newer = caches.write(tmp_path / "newer/berlin.zarr", caches.features(8), source="newer").path
    with monkeypatch.context() as patch:
        signed_at(patch, "2026-01-31T09:00:00.000001+00:00")
        pack(path, tmp_path / "old.zip", key=key)
        signed_at(patch, "2026-01-31T09:00:00.000002+00:00")
        pack(newer, tmp_path / "new.zip", key=key)
    return tmp_path / "old.zip", tmp_path / "new.zip"


@pytest.mark.parametrize("unsigned", [False, True])
def test_an_older_cache_replaces_no_newer_one(
    tmp_path: Path, path: Path, key: Path, unsigned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two(tmp_path, path, key, monkeypatch)
    if unsigned:
        old = pack(path, tmp_path / "bare.zip").path
    target = tmp_path / "in/berlin.zarr"
    unpack(new, target)
    words = "not signed, but" if unsigned else r"signed 2026-01-31T09:00:00.000001Z, but"
    with pytest.raises(UserError, match=f"{words}.*--allow-older"):
        unpack(old, target, overwrite=True)
    assert FeatureCache(target).images == 8
    shutil.rmtree(target)
    with pytest.raises(UserError, match="--allow-older"):
        unpack(old, target)
    unpack(old, target, allow_older=True)
    assert received(target, silo="berlin").images == 10
    unpack(new, target, overwrite=True)
    assert received(target, silo="berlin").images == 8


def test_an_older_zip_in_place_is_not_used(
    tmp_path: Path, path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two(tmp_path, path, key, monkeypatch)
    place = tmp_path / "features/berlin.zarr.zip"
    place.parent.mkdir()
    shutil.copy(new, place)
    trust = key.with_suffix(".pub")
    assert received(place, silo="berlin", trust=trust).images == 8
    shutil.copy(old, place)
    for _ in range(2):
        with pytest.raises(UserError, match=r"was signed 2026-01-31T09:00:00\.000002Z"):
            received(place, silo="berlin", trust=trust)
    assert run("cache", "verify", place).exit_code == 2
    allowed = run("cache", "verify", place, "--allow-older")
    assert (allowed.exit_code, "whole and sound" in allowed.output) == (0, True)
    assert received(place, silo="berlin", trust=trust).images == 10


@pytest.mark.parametrize("kind", FORMS)
def test_trust_holds_at_use(tmp_path: Path, path: Path, key: Path, kind: str) -> None:
    trust, stranger = key.with_suffix(".pub"), new_key(tmp_path / "stranger")

    def put(**words: object) -> Path:
        shutil.rmtree(tmp_path / "features", ignore_errors=True)
        packed = pack(path, tmp_path / "p.zip", overwrite=True, **words).path  # type: ignore[arg-type]
        place = tmp_path / "features" / ("berlin.zarr.zip" if kind == "zip" else "berlin.zarr")
        place.parent.mkdir()
        if kind == "zip":
            return Path(shutil.copy(packed, place))
        silo = words.get("silo", "berlin")
        return Path(shutil.move(unpack(packed, tmp_path / f"in/{silo}.zarr", overwrite=True).path, place))

    for words, message in (
        ({}, "it is not signed; have it packed with --sign"),
        ({"key": stranger}, "not signed by the owner of"),
        ({"key": key, "silo": "lyon"}, "signed as silo 'lyon', not as 'berlin'"),
    ):
        (tmp_path / "in/.berlin.zarr.verified.json").unlink(missing_ok=True)
        place = put(**words)
        for _ in range(2):
            with pytest.raises(UserError, match=message):
                received(place, silo="berlin", trust=trust)
    (tmp_path / "in/.berlin.zarr.verified.json").unlink(missing_ok=True)
    place = put(key=key)
    assert received(place, silo="berlin", trust=trust).images == 10
    # Remembered or not, the key is asked at every use.
    with pytest.raises(UserError, match="not signed by the owner of"):
        received(place, silo="berlin", trust=stranger.with_suffix(".pub"))


def test_trust_in_the_experiment(extracted: Path, tmp_path: Path, key: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(extracted.parent / "features", features)
    options = [f"features={features}", 'federate.silos=["lab"]', "federate.rounds=1", f"build={tmp_path}/b"]
    options.append(f'trust.lab="{key}.pub"')
    words = ["federate", extracted, *(part for each in options for part in ("--set", each))]
    unsigned = run(*words)
    assert (unsigned.exit_code, "lab.zarr: it is not signed" in unsigned.output) == (2, True), unsigned.output
    packed = pack(features / "lab.zarr", tmp_path / "lab.zip", key=key).path
    unpack(packed, features / "lab.zarr", trust=key.with_suffix(".pub"), overwrite=True)
    signed = run(*words)
    assert signed.exit_code == 0, signed.output
    typo = run(*words, "--set", f'trust.lba="{key}.pub"')
    assert (typo.exit_code, "trust names lba" in typo.output) == (2, True)


def test_trust_decides_no_run(extracted: Path, key: Path) -> None:
    from fedcmp.components import load
    from fedcmp.pipeline.identity import run_identity

    plain, trusting = load(extracted), load(extracted, [f'trust.lab="{key}.pub"'])
    assert isinstance(plain, Experiment)
    assert run_identity(plain) == run_identity(trusting)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(64), "signed by an earlier version, without silo and time; have it packed with --sign again"),
        (b"nonsense", "its signature cannot be read"),
        (b"[" * 1000, "its signature cannot be read"),
        (b'{"format": 1}', "its signature cannot be read"),
    ],
)
def test_signatures_that_say_nothing(
    tmp_path: Path, path: Path, key: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcmp.pipeline.handover.pack.sign", lambda *_: content)
    packed = pack(path, tmp_path / "p.zip", key=key).path
    with pytest.raises(UserError, match=message):
        unpack(packed, tmp_path / "in/berlin.zarr", trust=key.with_suffix(".pub"))
    assert unpack(packed, tmp_path / "in/berlin.zarr").images == 10
    assert received(tmp_path / "in/berlin.zarr", silo="berlin").images == 10


@pytest.mark.parametrize("field", ["silo", "time", "ed25519"])
def test_nothing_signed_can_be_changed(tmp_path: Path, path: Path, key: Path, field: str) -> None:
    data = (path / "manifest.json").read_bytes()
    made = json.loads(signature.sign(data, key, "lyon"))
    made[field] = {"silo": "berlin", "time": "2099-01-01T00:00:00.000000Z", "ed25519": "00" * 64}[field]
    with pytest.raises(UserError, match="not signed by the owner"):
        signature.require_trusted(
            data, json.dumps(made).encode(), key.with_suffix(".pub"), made["silo"], "it"
        )


def test_marks_say_what_was_accepted(tmp_path: Path, path: Path, key: Path) -> None:
    target = tmp_path / "in/berlin.zarr"
    unpack(pack(path, tmp_path / "p", key=key).path, target)
    mark = remembered(target)
    assert mark is not None
    claim = signature.claim_of((target / "manifest.sig").read_bytes())
    assert claim is not None
    assert mark.signed == claim.plain()
    assert claim.silo == "berlin"
