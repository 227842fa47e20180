"""Caches looked at, checked, packed, unpacked, cut and joined."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import caches
import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import digest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.cli import main
from fedcmp.pipeline.cache import CorruptCacheError, FeatureCache, Quantiser, partial_path
from fedcmp.pipeline.cache.derive import merge, replace_texts, subset
from fedcmp.pipeline.cache.verify import verify
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.signature import sign
from fedcmp.pipeline.handover.unpack import unpack


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["cache", *map(str, words)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return caches.write(tmp_path / "s.zarr", caches.features(10), failed=(3, 5)).path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    pem, plain = form.Encoding.PEM, form.NoEncryption()
    (tmp_path / "me").write_bytes(private.private_bytes(pem, form.PrivateFormat.OpenSSH, plain))
    public = private.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    (tmp_path / "me.pub").write_bytes(public + b" me@here\n")
    return tmp_path / "me"


FORMS = [{}, {"zstd": True}, {"hdf5": True}]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_round_trip_gives_the_very_bytes(tmp_path: Path, path: Path, form: dict[str, bool]) -> None:
    packed = pack(path, tmp_path / "packed", **form)
    received = unpack(packed.path, tmp_path / "there" / "s.zarr")
    assert digest(received.path) == digest(path)
    assert packed.manifest == received.manifest
    assert verify(received.path) == []
    again = pack(path, tmp_path / "again", **form)
    assert again.path.read_bytes() == packed.path.read_bytes()
    assert sorted(os.listdir(tmp_path / "there")) == [".s.zarr.lock", ".s.zarr.verified.json", "s.zarr"]


@settings(max_examples=15, deadline=None)
@given(
    images=st.integers(1, 9),
    shard=st.integers(1, 5),
    dtype=st.sampled_from(["uint16", "float16", "float32"]),
    form=st.sampled_from(FORMS),
    failing=st.booleans(),
)
def test_any_cache_survives_the_journey(tmp_path_factory, images, shard, dtype, form, failing) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("journey")
    stored = caches.features(images, 2, 3)
    stored = stored if dtype == "uint16" else stored.astype(dtype)
    cache = caches.write(root / "s.zarr", stored, shard=shard, failed=(0,) if failing else ())
    assert verify(cache.path) == []
    pack(cache.path, root / "p", **form)
    received = unpack(root / "p", root / "r.zarr")
    assert digest(received.path) == digest(cache.path)


def test_the_phone_call(tmp_path: Path, path: Path) -> None:
    packed = pack(path, tmp_path / "p.zip")
    spoken = " ".join(packed.manifest[i : i + 8] for i in range(0, 64, 8)).upper()
    unpack(packed.path, tmp_path / "a.zarr", expect=spoken)
    with pytest.raises(UserError, match=rf"{packed.manifest}, not 00ff"):
        unpack(packed.path, tmp_path / "b.zarr", expect="00ff")
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_signatures(tmp_path: Path, path: Path, key: Path, form: dict[str, bool]) -> None:
    trusted = key.with_suffix(".pub")
    pack(path, tmp_path / "signed", key=key, **form)
    received = unpack(tmp_path / "signed", tmp_path / "in" / "s.zarr", trust=trusted)
    assert received.signed
    assert verify(received.path) == []
    (received.path / "manifest.sig").unlink()
    assert digest(received.path) == digest(path)
    pack(path, tmp_path / "bare", **form)
    with pytest.raises(UserError, match="not signed; have it packed with --sign"):
        unpack(tmp_path / "bare", tmp_path / "b.zarr", trust=trusted)
    other = caches.write(tmp_path / "other.zarr", caches.features(10, seed=1)).path
    from fedcmp.pipeline.handover import pack as packing

    real = packing.sign
    try:
        packing.sign = lambda data, key, silo: real((path / "manifest.json").read_bytes(), key, silo)
        pack(other, tmp_path / "forged", key=key, silo="b", **form)
    finally:
        packing.sign = real
    with pytest.raises(UserError, match=r"not signed by the owner of .*me\.pub; do not use it"):
        unpack(tmp_path / "forged", tmp_path / "b.zarr", trust=trusted)
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_signature_goes_on_with_the_cache(
    tmp_path: Path, path: Path, key: Path, form: dict[str, bool]
) -> None:
    """Who packs again what another signed has not to sign it, and need not have the key."""
    trusted = key.with_suffix(".pub")
    first = unpack(pack(path, tmp_path / "signed", key=key).path, tmp_path / "in" / "s.zarr", trust=trusted)
    again = pack(first.path, tmp_path / "again", **form)
    assert (again.signed, again.left_out) == (True, None)
    there = unpack(tmp_path / "again", tmp_path / "there" / "s.zarr", trust=trusted).path
    assert digest(there) == digest(first.path)
    said = CliRunner().invoke(main, ["cache", "pack", str(there), "--out", str(tmp_path / "third.zip")])
    assert "MB, signed as it came" in said.output


def spoiled_signatures(path: Path, key: Path) -> dict[str, bytes]:
    """Signatures that do not fit, by what is said of them."""
    made = json.loads(sign((path / "manifest.json").read_bytes(), key, "s"))
    other = json.loads(sign(b"another manifest", key, "s"))

    def written(value: object) -> bytes:
        return json.dumps(value).encode()

    return {
        "its signature does not fit its manifest": written(other),
        "its signature does not fit its manifest#key": written(made | {"key": "00" * 32}),
        "its signature does not fit its manifest#length": written(made | {"key": "00"}),
        "its signature does not fit its manifest#silo": written(made | {"silo": "t"}),
        "its signature cannot be read": b"nonsense",
        "its signature cannot be read#long": written(made | {"more": "x" * 1024}),
        "its signature is of an earlier version": written({k: v for k, v in made.items() if k != "key"}),
        "its signature is of an earlier version#key": written(made | {"key": 1}),
    }


@pytest.mark.parametrize("number", range(8))
def test_a_signature_that_does_not_fit_goes_nowhere_and_that_is_said(
    tmp_path: Path, path: Path, key: Path, number: int
) -> None:
    why, signature = list(spoiled_signatures(path, key).items())[number]
    (path / "manifest.sig").write_bytes(signature)
    words = ["cache", "pack", str(path), "--out", str(tmp_path / "p.zip")]
    said = CliRunner().invoke(main, words)
    if why.endswith("#long"):
        assert (said.exit_code, "longer than 1024 bytes; do not use" in said.output) == (2, True)
        return
    assert said.exit_code == 0, said.output
    assert "MB, not signed" in said.output
    told = " ".join(said.output.split())
    assert f"The cache came signed, and goes without: {why.partition('#')[0]}" in told
    assert not unpack(tmp_path / "p.zip", tmp_path / "in" / "s.zarr").signed
    as_json = CliRunner().invoke(main, [*words, "--json", "--overwrite"])
    assert json.loads(as_json.output)["signature_left_out"].startswith(why.partition("#")[0])
    signed = pack(path, tmp_path / "signed.zip", key=key)
    assert (signed.signed, signed.left_out) == (True, None)
    assert unpack(signed.path, tmp_path / "in2" / "s.zarr", trust=key.with_suffix(".pub")).signed


def test_without_its_texts_a_cache_has_another_manifest_and_no_signature(
    tmp_path: Path, path: Path, key: Path
) -> None:
    first = unpack(pack(path, tmp_path / "signed", key=key).path, tmp_path / "in" / "s.zarr")
    packed = pack(first.path, tmp_path / "bare", texts=False)
    assert (packed.signed, packed.left_out) == (False, "its signature is of it with its texts")
    assert not unpack(packed.path, tmp_path / "there" / "s.zarr").signed


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"nonsense", "make a key with: ssh-keygen"), (None, "No such file")],
)
def test_a_bad_key_is_one_clear_line(tmp_path: Path, path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "bad").write_bytes(content)
    result = run("pack", path, "--out", tmp_path / "p.zip", "--sign", tmp_path / "bad")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "p.zip").exists()


@pytest.mark.parametrize("hdf5", [False, True])
def test_texts_can_be_left_out(tmp_path: Path, path: Path, hdf5: bool) -> None:
    packed = pack(path, tmp_path / "p", texts=False, hdf5=hdf5)
    content = packed.path.read_bytes()
    assert b"Bild 1" not in content
    assert b"was?" not in content
    unpack(packed.path, tmp_path / "r.zarr")
    received, whole = FeatureCache(tmp_path / "r.zarr"), FeatureCache(path)
    assert (received.texts, received.manifest["texts_left_out"]) == (0, True)
    assert received.ids == whole.ids
    np.testing.assert_array_equal(received.read([0, 9]), whole.read([0, 9]))
    assert digest(path / "features/patch/c") == digest(tmp_path / "r.zarr/features/patch/c")


def test_hdf5_is_plain_for_others(tmp_path: Path, path: Path) -> None:
    pack(path, tmp_path / "p.h5", hdf5=True)
    cache = FeatureCache(path)
    with h5py.File(tmp_path / "p.h5") as file:
        patches = file["features/patch"]
        assert patches.chunks is None
        assert patches.attrs["logical_dtype"] == "bfloat16"
        np.testing.assert_array_equal(patches[:], cache.read(range(10)))
        np.testing.assert_array_equal(file["images/status"][:], cache.status)
        assert file["texts/bytes"][:].tobytes() == cache.text_arrays[1][:]


def test_a_zip_is_read_in_place(tmp_path: Path, path: Path) -> None:
    pack(path, tmp_path / "s.zarr.zip")
    packed, folder = FeatureCache(tmp_path / "s.zarr.zip"), FeatureCache(path)
    order = [9, 0, 4, 4, 2]
    np.testing.assert_array_equal(packed.read(order), folder.read(order))
    assert packed.ids == folder.ids
    assert [packed.text(i) for i in range(packed.texts)] == [folder.text(i) for i in range(folder.texts)]
    assert packed.content == folder.content
    assert verify(tmp_path / "s.zarr.zip") == []
    pack(path, tmp_path / "z.zip", zstd=True)
    with pytest.raises(UserError, match="unpack it with 'fedcmp cache unpack'"):
        FeatureCache(tmp_path / "z.zip")


def test_a_damaged_cache_is_not_packed(tmp_path: Path, path: Path) -> None:
    shard = path / "features/patch/c/1/0/0"
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    for form in FORMS:
        with pytest.raises(CorruptCacheError, match="c/1/0/0"):
            pack(path, tmp_path / "p", **form)
    assert sorted(os.listdir(tmp_path)) == [".s.zarr.verified.json", "s.zarr"]


def test_nothing_is_replaced_unasked(tmp_path: Path, path: Path) -> None:
    packed = pack(path, tmp_path / "p.zip").path
    with pytest.raises(UserError, match="pass --overwrite"):
        pack(path, packed)
    with pytest.raises(UserError, match="pass --overwrite"):
        unpack(packed, path)
    other = caches.write(tmp_path / "o.zarr", caches.features(3), source="other").path
    unpack(packed, other, overwrite=True)
    assert digest(other) == digest(path)


def test_unpack_goes_on_where_it_stopped(tmp_path: Path, path: Path) -> None:
    packed = pack(path, tmp_path / "p.zip").path
    incoming = tmp_path / "r.zarr.incoming"
    good, bad = incoming / "features/patch/c/0/0/0", incoming / "features/patch/c/1/0/0"
    for file in (good, bad):
        file.parent.mkdir(parents=True)
    good.write_bytes((path / "features/patch/c/0/0/0").read_bytes())
    bad.write_bytes(b"half")
    (incoming / "stray").write_bytes(b"x")
    (incoming / "link").symlink_to("/etc/passwd")
    before = good.stat().st_mtime_ns, good.stat().st_ino
    unpack(packed, tmp_path / "r.zarr")
    assert digest(tmp_path / "r.zarr") == digest(path)
    kept = (tmp_path / "r.zarr/features/patch/c/0/0/0").stat()
    assert (kept.st_mtime_ns, kept.st_ino) == before


def test_a_subset(tmp_path: Path, path: Path) -> None:
    whole = FeatureCache(path)
    part = subset(whole, tmp_path / "a.zarr", ids=["é8.png", "é1.png"])
    assert part.ids == ["é1.png", "é8.png"]
    np.testing.assert_array_equal(part.read([0, 1]), whole.read([1, 8]))
    assert [part.text(i) for i in range(part.texts)] == [
        whole.text(i) for i in (0, *np.flatnonzero(whole.text_image == 8))
    ]
    assert part.cache_key == whole.cache_key
    tests = subset(whole, tmp_path / "b.zarr", split="test")
    assert tests.ids == [name for i, name in enumerate(whole.ids) if i % 3 == 2]
    assert {tests.text(i).split for i in range(tests.texts)} == {"test"}
    drawn = subset(whole, tmp_path / "c.zarr", number=5, seed=3)
    assert (drawn.images, drawn.manifest["failures"]) == (5, [])
    assert subset(whole, tmp_path / "d.zarr", number=5, seed=3).ids == drawn.ids
    assert subset(whole, tmp_path / "e.zarr", number=5, seed=4).ids != drawn.ids
    failed = subset(whole, tmp_path / "f.zarr", ids=["é3.png"])
    assert failed.manifest["failures"] == [{"id": "é3.png", "status": "missing", "reason": "gone"}]
    for name in "abcdef":
        assert verify(tmp_path / f"{name}.zarr") == []
    with pytest.raises(UserError, match=r"no image is called 'é88.png'; did you mean"):
        subset(whole, tmp_path / "g.zarr", ids=["é88.png"])
    with pytest.raises(UserError, match="only 8 readable images"):
        subset(whole, tmp_path / "g.zarr", number=9)
    with pytest.raises(UserError, match="another cache is there"):
        subset(whole, tmp_path / "a.zarr", number=2)


def test_merging_gives_back_what_was_cut(tmp_path: Path) -> None:
    stored = caches.features(11)
    whole = caches.write(tmp_path / "whole.zarr", stored, failed=(2, 10))
    halves = {
        name: subset(whole, tmp_path / f"{name}.zarr", ids=whole.ids[start:end])
        for name, start, end in (("a", 0, 5), ("b", 5, 11))
    }
    joined = merge(halves, tmp_path / "joined.zarr")
    assert digest(joined.path / "features") == digest(whole.path / "features")
    assert digest(joined.path / "images") == digest(whole.path / "images")
    assert digest(joined.path / "texts") == digest(whole.path / "texts")
    assert joined.manifest["failures"] == whole.manifest["failures"]
    assert verify(joined.path) == []
    assert merge(halves, tmp_path / "joined.zarr").content == joined.content


def test_what_cannot_be_merged(tmp_path: Path, path: Path) -> None:
    one, two = FeatureCache(path), caches.write(tmp_path / "two.zarr", caches.features(3))
    with pytest.raises(UserError, match=r"'é0.png' is an image of 'one' and of 'two'; pass --prefix"):
        merge({"one": one, "two": two}, tmp_path / "m.zarr")
    both = merge({"one": one, "two": two}, tmp_path / "m.zarr", prefix=True)
    assert both.ids == [*(f"one/é{i}.png" for i in range(10)), *(f"two/é{i}.png" for i in range(3))]
    wide = caches.write(tmp_path / "wide.zarr", caches.features(3, width=7), prefix="w")
    with pytest.raises(UserError, match="different shapes"):
        merge({"one": one, "wide": wide}, tmp_path / "n.zarr")
    assert not (tmp_path / "n.zarr").exists()


def test_new_texts_come_after_a_commit_that_was_killed(tmp_path: Path) -> None:
    """The features are those of the cache that was about to take the place."""
    old = caches.write(tmp_path / "a.zarr", caches.features(6))
    new = caches.write(tmp_path / "new.zarr", caches.features(6, seed=1), source="new")
    wanted = new.read(range(6))
    new.path.rename(partial_path(old.path))
    listing = tmp_path / "texts.jsonl"
    listing.write_text('{"image": "é1.png", "caption": "neu"}')
    made = replace_texts(old.path, listing)
    np.testing.assert_array_equal(made.read(range(6)), wanted)
    assert made.manifest["source"] == {"files": "new"}
    assert verify(made.path) == []


def test_licences_travel_with_the_features(extracted: Path, tmp_path: Path) -> None:
    made = {}
    for name, licence in (("clinic", "CC BY 4.0"), ("lab", "research only")):
        changes = [f"features={tmp_path}", f"extract.licence={licence}"]
        options = [part for change in changes for part in ("--set", change)]
        result = CliRunner().invoke(main, ["extract", str(extracted), "--silo", name, *options])
        assert result.exit_code == 0, result.output
        made[name] = FeatureCache(tmp_path / f"{name}.zarr")
        assert made[name].manifest["licence"] == licence
    assert (
        "licence: CC BY 4.0"
        in CliRunner().invoke(main, ["cache", "inspect", str(made["clinic"].path)]).output
    )
    part = subset(made["lab"], tmp_path / "part.zarr", number=3)
    assert part.manifest["licence"] == "research only"
    both = merge({"part": part, "clinic": made["clinic"]}, tmp_path / "both.zarr", prefix=True)
    assert both.manifest["licence"] == "CC BY 4.0; research only"
    assert verify(both.path) == []


def test_new_texts_leave_features_alone(tmp_path: Path, path: Path) -> None:
    shards = {file: file.stat().st_ino for file in (path / "features/patch/c").rglob("*") if file.is_file()}
    before, old = digest(path / "features"), FeatureCache(path)
    lines = [
        {"image": "é1.png", "caption": "neu"},
        {"image": "é0.png", "split": "test", "conversations": [
            {"from": "human", "value": "<image>\nwas?"}, {"from": "gpt", "value": "das"},
        ]},
    ]  # fmt: skip
    listing = tmp_path / "texts.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    new = replace_texts(path, listing)
    assert [new.text(i).turns[-1].content for i in range(new.texts)] == ["das", "neu"]
    assert [new.text(i).split for i in range(2)] == ["test", "train"]
    assert digest(path / "features") == before
    assert {file: file.stat().st_ino for file in shards} == shards
    assert verify(path) == []
    assert new.content != old.content
    assert new.manifest["source"] == old.manifest["source"]
    for bad, message in (
        ({"image": "x", "caption": "a"}, r"texts.jsonl:1: no image is called 'x'"),
        ({"image": "é1.png", "caption": " "}, "its caption is empty"),
        ({"image": "é1.png", "caption": "a", "split": "dev"}, "split 'dev'"),
    ):
        listing.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            replace_texts(path, listing)
    assert FeatureCache(path).content == new.content


def test_int8_costs_what_its_manifest_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scale = np.ones(64, np.float32)
    scale[[3, 40]] = 90.0
    exact = (rng.standard_normal((40, 16, 64), np.float32) + 0.7) * scale
    quantiser = Quantiser.fit(exact[:16])
    stored = quantiser.encode(exact)
    cache = caches.write(tmp_path / "s.zarr", stored, quantiser=quantiser, failed=(2,))
    assert verify(cache.path) == []
    decoded = cache.tensor(range(40)).numpy()
    usable = [row for row in range(40) if row != 2]
    relative = [
        np.linalg.norm((decoded - exact)[usable][..., channel]) / np.linalg.norm(exact[usable][..., channel])
        for channel in (0, 3)
    ]
    assert max(relative) < 0.012
    token = np.abs(exact).max(-1, keepdims=True) / 127
    plain = np.rint(exact / token) * token
    ours = np.linalg.norm((decoded - exact)[usable][..., 0])
    assert np.linalg.norm((plain - exact)[usable][..., 0]) > 5 * ours
    pack(cache.path, tmp_path / "p.h5", hdf5=True)
    unpack(tmp_path / "p.h5", tmp_path / "r.zarr")
    assert torch.equal(FeatureCache(tmp_path / "r.zarr").tensor([5]), cache.tensor([5]))
    part = subset(cache, tmp_path / "part.zarr", number=4)
    assert torch.equal(part.tensor([0]), cache.tensor([cache.ids.index(part.ids[0])]))
    other = caches.write(tmp_path / "o.zarr", stored, quantiser=Quantiser.fit(2 * exact), prefix="o")
    with pytest.raises(UserError, match="int8 of different steps"):
        merge({"a": cache, "b": other}, tmp_path / "m.zarr")


def test_commands_for_people_and_scripts(tmp_path: Path, path: Path) -> None:
    caches.write(tmp_path / "t.zarr", caches.features(4), source="other")
    listed = json.loads(run("ls", tmp_path, "--json").output)
    assert [(each["silo"], each["images"], each["failed"]) for each in listed] == [("s", 10, 2), ("t", 4, 0)]
    assert "2" in run("ls", tmp_path).output
    seen = json.loads(run("inspect", path, "--json").output)
    assert seen["status"] == {"ok": 8, "missing": 2, "unreadable": 0, "not finite": 0}
    assert sum(seen["features"]["histogram"]["counts"]) <= 8 * 24
    assert seen["features"]["not_finite"] == 0
    assert "é1.png" in run("inspect", path, "--texts", 9).output
    checked = run("verify", path, "--json")
    assert (checked.exit_code, json.loads(checked.output)[0]["ok"]) == (0, True)
    differing = run("diff", path, tmp_path / "t.zarr", "--json")
    assert differing.exit_code == 1
    assert json.loads(differing.output)["source"] == ['files: "abc" here, "other" there']
    assert run("diff", path, path).exit_code == 0
    packed = run("pack", path, "--out", tmp_path / "p.zip", "--json")
    received = run("unpack", tmp_path / "p.zip", "--to", tmp_path / "in", "--name", "site", "--json")
    assert json.loads(packed.output)["manifest_sha256"] == json.loads(received.output)["manifest_sha256"]
    assert FeatureCache(tmp_path / "in/site.zarr").images == 10
    assert run("subset", path, "--out", tmp_path / "u.zarr", "--number", 3).exit_code == 0
    ids = tmp_path / "ids.txt"
    ids.write_text("é0.png\né3.png\n")
    assert run("subset", path, "--out", tmp_path / "v.zarr", "--ids", ids).exit_code == 0
    assert FeatureCache(tmp_path / "v.zarr").ids == ["é0.png", "é3.png"]
    assert (
        run(
            "merge", tmp_path / "u.zarr", tmp_path / "v.zarr", "--out", tmp_path / "w.zarr", "--prefix"
        ).exit_code
        == 0
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "none"], "no feature cache there; run 'fedcmp extract' first"),
        (["verify", "none"], "there is no manifest.json"),
        (["inspect", "none"], "does not exist"),
        (["subset", "s.zarr", "--out", "x.zarr"], "pass --ids, --split or --number"),
        (["subset", "s.zarr", "--out", "x.zarr", "--split", "dev"], "--split dev: expected train"),
        (["unpack", "s.zarr/zarr.json"], "neither a zip nor HDF5"),
        (["unpack", "p.zip", "--name", "../x"], "expected a plain name"),
        (["pack", "s.zarr", "--hdf5", "--zstd"], "only a zip is compressed"),
        (["texts", "s.zarr", "none.jsonl"], "No such file"),
    ],
)
def test_mistakes_are_one_clear_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(path.parent)
    result = run(*words)
    assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1)
    assert message in result.output


def test_a_strangers_words_do_not_steer_the_terminal(tmp_path: Path) -> None:
    cache = caches.write(tmp_path / "s.zarr", caches.features(3), prefix="\x1b[2J\x07")
    assert "\x1b" not in run("inspect", cache.path).output


def test_zip_members_are_plain_files(tmp_path: Path, path: Path) -> None:
    pack(path, tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[0] == "manifest.json"
