from __future__ import annotations

import json
import re
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import digest, write_llava, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.cli import main
from fedcmp.extract.deal import Partition, by_hash, deal, dirichlet, portions
from fedcmp.extract.sources.base import SOURCES, Skipped
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Component

words = st.text(min_size=1, max_size=5).filter(str.isprintable)
labels = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=80)


@given(labels=labels, silos=st.integers(1, 7), alpha=st.floats(1e-6, 1e4), seed=st.integers(0, 9))
def test_dirichlet_is_reproducible(labels: list[str], silos: int, alpha: float, seed: int) -> None:
    silo = dirichlet(labels, silos, alpha, np.random.default_rng(seed))
    assert silo.shape == (len(labels),)
    assert set(silo.tolist()) <= set(range(silos))
    np.testing.assert_array_equal(silo, dirichlet(labels, silos, alpha, np.random.default_rng(seed)))


@given(number=st.integers(0, 500), shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_shares_are_kept_to_within_one_image(number: int, shares: list[float]) -> None:
    parts = portions(number, shares)
    assert parts.sum() == number
    assert (np.abs(parts - np.array(shares) / sum(shares) * number) < 1 + 1e-9).all()


@settings(max_examples=50)
@given(
    names=st.lists(words, min_size=6, max_size=40, unique=True),
    by=st.sampled_from(["dirichlet", "quantity", "hash", "field"]),
    seed=st.integers(0, 3),
)
def test_every_image_is_in_just_one_silo(names: list[str], by: str, seed: int) -> None:
    alpha = 0.7 if by == "dirichlet" else None
    options = Partition(by=by, silos=3, alpha=alpha, min_size=0, seed=seed)
    marks = [f"label {len(name)}" for name in names]
    silo, silos = deal(options, names, marks)
    assert silo.shape == (len(names),)
    assert len(set(silos)) == len(silos)
    assert set(silo.tolist()) <= set(range(len(silos)))
    again, _ = deal(options, names, marks)
    np.testing.assert_array_equal(silo, again)


@given(
    names=st.lists(st.text(max_size=5).filter(str.isprintable), max_size=30), more=st.text("xyz", min_size=1)
)
def test_hash_depends_on_the_name_alone(names: list[str], more: str) -> None:
    assert by_hash([*names, more], 5).tolist()[:-1] == by_hash(names, 5).tolist()


def test_hash_is_uniform() -> None:
    counts = np.bincount(by_hash([f"{n}.png" for n in range(10_000)], 4))
    assert (np.abs(counts - 2500) < 200).all()


def test_alpha_is_the_skew() -> None:
    marks = [f"{n % 5}" for n in range(5000)]

    def largest(alpha: float) -> float:
        silo = dirichlet(marks, 5, alpha, np.random.default_rng(0))
        tops = [Counter(m for m, s in zip(marks, silo, strict=True) if s == k) for k in range(5)]
        return float(np.mean([max(top.values()) / top.total() for top in tops if top]))

    assert largest(0.05) > 0.6
    assert largest(1000) < 0.25


def test_quantity_by_shares_power_and_draw() -> None:
    names = [f"{n}" for n in range(600)]

    def sizes(**options: object) -> list[int]:
        silo, silos = deal(Partition(by="quantity", **options), names, [""] * 600)
        return np.bincount(silo, minlength=len(silos)).tolist()

    assert sizes(shares=(3, 2, 1)) == [300, 200, 100]
    assert sizes(silos=3) == [200, 200, 200]
    assert sizes(silos=3, power=1.0) == [327, 164, 109]
    drawn = sizes(silos=6, alpha=0.3, min_size=20)
    assert min(drawn) >= 20
    assert max(drawn) > 150
    assert drawn != sizes(silos=6, alpha=0.3, min_size=20, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "quantity"}, "how many silos"),
        ({"by": "quantity", "shares": (1, 2), "silos": 3}, "--silos 3, --shares 2"),
        ({"by": "quantity", "shares": (0, 0)}, "positive sum"),
        ({"by": "quantity", "shares": (1, 2), "power": 1}, "--shares and --power"),
        ({"by": "dirichlet", "silos": 2}, "--alpha is missing"),
        ({"by": "dirichlet", "silos": 2, "alpha": 1, "min_size": 6}, "fewer than --min-size 6"),
        ({"by": "hash", "silos": 50}, "would get 0 images"),
        ({"by": "hash", "names": ("a", "a")}, "named more than once"),
    ],
)
def test_unfit_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        deal(Partition(**options), [f"{n}" for n in range(10)], ["x"] * 10)


def test_labels_that_become_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="'a b' and 'a_b' would both be silo 'a_b'"):
        deal(Partition(by="field"), ["1", "2"], ["a b", "a_b"])


def pairs(folder: Path, number: int = 30) -> Path:
    path = write_llava(folder, number)
    entries = json.loads(path.read_text())
    for place, entry in enumerate(entries):
        entry["meta"] = {"site": ("Charité Berlin", "Lyon", 7)[place % 3]}
        entry["kept"] = place
    again = [{**entry, "caption": "once more", "conversations": None} for entry in entries[:10]]
    again = [{key: value for key, value in entry.items() if value is not None} for entry in again]
    path.write_text(json.dumps([*entries, *again, {"image": "../x.png", "caption": "no"}, {"caption": "?"}]))
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["partition", *map(str, words)])


def read(out: Path) -> dict[str, list[dict]]:
    return {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(out.glob("*.jsonl"))
    }


@pytest.mark.parametrize(
    "how",
    [
        ["--by", "hash", "--silos", 3],
        ["--by", "quantity", "--shares", "5,3,2"],
        ["--by", "dirichlet", "--field", "meta.site", "--silos", 3, "--alpha", 0.5],
        ["--by", "field", "--field", "meta.site"],
        ["--by", "field", "--pattern", r"(\d)\.png$"],
        ["--by", "field", "--component", 0],
    ],
    ids=lambda how: " ".join(map(str, how[1:4])),
)
def test_texts_of_one_image_stay_together(tmp_path: Path, how: list[object]) -> None:
    source = pairs(tmp_path)
    result = run(source, "--out", tmp_path / "out", *how)
    assert result.exit_code == 0, result.output
    silos = read(tmp_path / "out")
    homes = defaultdict(set)
    for name, entries in silos.items():
        for entry in entries:
            homes[entry["image"]].add(name)
    assert len(homes) == 30
    assert all(len(home) == 1 for home in homes.values())
    wanted = json.loads(source.read_text())[:40]
    got = [entry for entries in silos.values() for entry in entries]
    assert sorted(got, key=str) == sorted(wanted, key=str)
    assert "lies outside" in result.output
    snippet = tomllib.loads(result.output[result.output.index("[extract.silos]") :])
    found = 0
    for options in snippet["extract"]["silos"].values():
        records = list(SOURCES.build(Component(**options), "silo").records())
        assert not [item for item in records if isinstance(item, Skipped)]
        found += sum(bool(record.read_image()) for record in records)
    assert found == 30
    before = digest(tmp_path / "out")
    assert "(unchanged)" in run(source, "--out", tmp_path / "out", *how).output
    assert run(source, "--out", tmp_path / "other", *how).exit_code == 0
    assert digest(tmp_path / "other") == before


def test_the_table_says_what_each_silo_got(tmp_path: Path) -> None:
    result = run(pairs(tmp_path), "--out", tmp_path / "out", "--by", "field", "--field", "meta.site")
    assert set(read(tmp_path / "out")) == {"7", "Charit_Berlin", "Lyon"}
    assert re.search(r"Charit_Berlin\W+10\W+14\W+Charité Berlin 100%", result.output)


def test_another_partition_is_not_overwritten_unasked(tmp_path: Path) -> None:
    source, out = pairs(tmp_path), tmp_path / "out"
    assert run(source, "--out", out, "--by", "hash", "--silos", 3).exit_code == 0
    refused = run(source, "--out", out, "--by", "hash", "--silos", 2)
    assert refused.exit_code == 2
    assert "another partition is there" in refused.output
    assert run(source, "--out", out, "--by", "hash", "--silos", 2, "--overwrite").exit_code == 0
    assert set(read(out)) == {"silo_0", "silo_1"}


def test_a_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pairs(tmp_path), tmp_path / "out"
    words = [source, "--out", out, "--by", "hash", "--silos", 3]
    run(*words)
    whole = digest(out)
    (out / "silo_1.jsonl").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedcmp.extract.partition.write_atomic", full)
    assert run(*words).exit_code == 2
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    assert run(*words).exit_code == 0
    assert digest(out) == whole


def test_any_source_can_be_split(tmp_path: Path) -> None:
    samples = [{"__key__": f"k{n}", "png": b"x", "txt": f"words {n}".encode()} for n in range(12)]
    write_shard(tmp_path / "0.tar", [*samples, {"__key__": "bare", "png": b"x"}])
    source = tmp_path / "source.toml"
    source.write_text(f'name = "webdataset"\npath = "{tmp_path}/*.tar"\nsplit = "test"\n')
    result = run(source, "--out", tmp_path / "out", "--by", "quantity", "--shares", "2,1")
    assert result.exit_code == 0, result.output
    silos = read(tmp_path / "out")
    assert [len(entries) for entries in silos.values()] == [8, 4]
    assert silos["silo_1"][0].keys() == {"image", "caption"}
    assert "skipped bare.png: no text is about it" in result.output
    assert "unpack the pictures of" in result.output
    assert 'split = "test"' in result.output
    refused = run(source, "--out", tmp_path / "x", "--by", "field", "--field", "site")
    assert "only LLaVA JSON and tables have fields" in refused.output


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--by", "field"], "needs a label"),
        (["--by", "field", "--field", "a", "--component", 1], "both give the label"),
        (["--by", "field", "--pattern", "("], "not a regular expression"),
        (["--by", "field", "--field", "nothing"], "it has no 'nothing'"),
        (["--by", "hash", "--silos", 0], "silos = 0"),
        (["--by", "hash", "--name", "../x"], "names"),
        (["--by", "quantity", "--shares", "1,x"], "shares"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, how: list[object], message: str) -> None:
    result = run(pairs(tmp_path), "--out", tmp_path / "out", *how)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
