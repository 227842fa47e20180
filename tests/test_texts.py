"""A text that cannot be trained on is counted, named and left out, before the first round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.client.stream import Stream
from fedcmp.federate.client.texts import unusable
from fedcmp.federate.engines.service import Service
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import problems, tokenise
from fedcmp.pipeline.records import Text, Turn

BAD = {
    "an answer with <image>": ("What is it?", "a page with an <image> tag"),
    "a question without room": ("Is there a star? " * 60, "no"),
}


@pytest.fixture(scope="module")
def language(llama_dir: Path) -> FrozenLanguageModel:
    return FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")


def write(folder: Path, texts: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (asked, answer) in enumerate(texts):
        (folder / f"{number}.png").write_bytes(picture(number))
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
        entries.append({"image": f"{number}.png", "conversations": turns})
    (folder / "pairs.json").write_text(json.dumps(entries))


def invoke(command: str, config: Path, *overrides: str) -> Result:
    words = [word for override in overrides for word in ("--set", override)]
    return CliRunner().invoke(main, [command, str(config), *words])


@pytest.fixture(scope="module")
def mixed(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of which one silo has bad texts among good ones, and one has none."""
    root = tmp_path_factory.mktemp("mixed")
    good = [(f"What is number {n}?", f"a dog {n}") for n in range(9)]
    write(root / "clinic", [*good[:4], *BAD.values(), *good[4:]])
    write(root / "lab", good)
    text = (workplace / "experiment.toml").read_text()
    start, end = text.index("[extract.silos]"), text.index("[language]")
    silos = "".join(
        f'{name} = {{ name = "llava_json", path = "{root}/{name}/pairs.json", images = "{root}/{name}" }}\n'
        for name in ("clinic", "lab")
    )
    text = f"{text[:start]}[extract.silos]\n{silos}{text[end:]}"
    text = text.replace(str(workplace / "features"), f"{root}/features")
    text = text.replace(f'build = "{workplace}/build"', f'build = "{root}/build"')
    text = text.replace("[language]", '[language]\ntemplate = "v1"\nmax_length = 150')
    (root / "mixed.toml").write_text(text)
    result = invoke("extract", root / "mixed.toml")
    assert result.exit_code == 0, result.output
    return root / "mixed.toml"


def test_a_run_leaves_them_out_and_says_so(mixed: Path) -> None:
    result = invoke("federate", mixed)
    assert result.exit_code == 0, result.output
    assert "clinic: 2 of 11 training texts cannot be trained on and are left out" in result.output
    assert "lab: " not in result.output.split("Run mixed")[0]
    out = mixed.parent / "build/runs/study/mixed"
    manifest = read_json(out / "manifest.json")
    assert manifest["texts"] == {
        "clinic": {"samples": 9, "left_out": 2},
        "lab": {"samples": 9, "left_out": 0},
    }
    rows = [json.loads(line) for line in (out / "left_out/clinic.jsonl").read_text().splitlines()]
    assert [(row["silo"], row["image"], row["text"]) for row in rows] == [
        ("clinic", "4.png", 4),
        ("clinic", "5.png", 5),
    ]
    assert "refers to 2 images" in rows[0]["reason"]
    assert "language.max_length = 150 leaves no room" in rows[1]["reason"]
    assert not (out / "left_out/lab.jsonl").exists()
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert sum(row["samples"] for row in history if row["client"]) == 18
    assert "nothing to do" in invoke("federate", mixed).output


def rows_of(root: Path, run: str) -> list[dict]:
    lines = (root / "build/runs/study" / run / "history.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["client"]]


def test_all_others_are_trained_on(mixed: Path, tmp_path: Path) -> None:
    """With one batch a round their order does not matter: the losses are those of a silo without the bad."""
    options = ("federate.rounds=1", "federate.batch_size=9", "run=whole")
    assert invoke("federate", mixed, *options).exit_code == 0
    write(tmp_path / "clinic", [(f"What is number {n}?", f"a dog {n}") for n in range(9)])
    for number in reversed(range(4, 9)):  # pictures as in the mixed silo
        (tmp_path / f"clinic/{number}.png").write_bytes(picture(number + 2))
    text = mixed.read_text()
    for name in ("clinic", "features", "build"):
        text = text.replace(f"{mixed.parent}/{name}", f"{tmp_path}/{name}")
    (tmp_path / "mixed.toml").write_text(text)
    assert invoke("extract", tmp_path / "mixed.toml").exit_code == 0
    assert invoke("federate", tmp_path / "mixed.toml", *options).exit_code == 0
    ours, theirs = rows_of(mixed.parent, "whole"), rows_of(tmp_path, "whole")
    for name in ("tokens", "samples"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)


def test_a_site_counts_its_own(mixed: Path) -> None:
    service = Service(load(mixed, ["run=site"]), "clinic")
    card = service.handle({"kind": "hello"})["card"]
    assert (card["samples"], card["left_out"]) == (9, 2)


def test_a_silo_of_bad_texts_alone_is_refused(mixed: Path) -> None:
    result = invoke("federate", mixed, "language.max_length=20", "run=none")
    assert result.exit_code == 2
    assert "silo clinic: none of its 11 training texts can be trained on; the first: " in result.output


def test_what_was_found_is_remembered_until_something_changes(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(
        "fedcmp.federate.client.texts.unusable", lambda cache, *_, **__: looked.append(cache.path) or {}
    )
    assert invoke("federate", mixed, "run=again", "federate.rounds=2").exit_code == 0
    assert not looked
    assert (
        invoke("federate", mixed, "run=other", "language.max_length=149", "federate.rounds=0").exit_code == 0
    )
    assert len(looked) == 2


def test_the_order_is_that_of_before_where_no_text_is_bad(mixed: Path, language: FrozenLanguageModel) -> None:
    """`[seed, silo]` permutes ascending indices; a golden hash of the world's run says the same."""
    cache = FeatureCache(mixed.parent / "features/lab.zarr")
    how = {"template": "v1", "max_length": 150, "visual_tokens": 4}
    found = unusable(cache, language.tokenizer, **how)  # type: ignore[arg-type]
    assert found == {}
    how |= {"batch_size": 4, "turns": 2, "seed": 3}
    streams = [
        Stream({"lab": cache}, language, **how, without=without)  # type: ignore[arg-type]
        for without in (None, {"lab": found}, {"elsewhere": {0: "x"}})
    ]
    orders = [np.concatenate([one.samples(turn) for turn in (0, 1)]).tolist() for one in streams]
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == [[0, index] for index in range(9)]
    assert orders[0] != sorted(orders[0])


words = st.lists(st.sampled_from(["a", "dog", "<image>", "star\n", "", "red circle "]), max_size=12).map(
    " ".join
)
conversations = st.lists(st.tuples(words, words.filter(bool)), min_size=1, max_size=3)


@given(conversations, st.booleans(), st.sampled_from(["plain", "v1", "chat"]), st.integers(8, 120))
@settings(max_examples=150, deadline=None)
def test_problems_are_what_tokenise_refuses(
    language: FrozenLanguageModel, pairs: list[tuple[str, str]], bare: bool, template: str, limit: int
) -> None:
    if bare:
        text = Text((Turn("assistant", pairs[0][1]),))
    else:
        text = Text(tuple(turn for q, a in pairs for turn in (Turn("user", q), Turn("assistant", a))))
    good = Text((Turn("assistant", "a dog"),))
    found = problems([good, text], template, language.tokenizer, patches=4, max_length=limit)[1]
    try:
        tokenise(text, template, language.tokenizer, patches=4, max_length=limit)
        refused = None
    except UserError as error:
        refused = str(error)
    assert found == refused
