"""Words of one's own and evaluations of a part: each is another question, or said wherever a score is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from official import WRITERS
from test_benchmarks import FILES, build, items_of
from test_scores import fine, refused

import fedcmp
from fedcmp.evaluate.answering import cut
from fedcmp.evaluate.work import _keys
from fedcmp.pipeline.config import Language
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.models.prompts import require_system_prompt, tokenise
from fedcmp.pipeline.records import Text, Turn
from fedcmp.pipeline.world import models

# Of the files in official.py. What is saved under a key stays: another one would ask everything again.
KEYS = {
    "caption_table": "a9d2ec78ed1e6719",
    "captions": "af345513e1c1b200",
    "classify": "3ba652de460a1ac0",
    "gqa": "fff489f120dd352c",
    "mcq": "bc2b355c5fb112cd",
    "mm_vet": "3d659bedcfb86cc2",
    "mmbench": "e125c3cf31520df0",
    "mme": "27e758e915764d20",
    "pope": "a059969861ddbdd9",
    "retrieval": "b174f2e740fcfa67",
    "scienceqa": "1408a9936a2377a7",
    "seed_bench": "a78776b32f7d0c58",
    "textvqa": "e7a23ebcdb5aa48f",
    "vizwiz": "34f8eca9ededfd7a",
    "vqa": "a4b9e121868b80d0",
    "vqav2": "11f4a4b4d3297d4d",
    "yes_no": "f4117324823599e7",
}


@pytest.mark.parametrize("name", sorted(KEYS))
def test_answers_are_saved_under_their_usual_keys(name: str, tmp_path: Path) -> None:
    experiment: Any = SimpleNamespace(language=Language(path=Path("unused")))
    benchmark = build(name, tmp_path)
    items = [benchmark.worded(each) for each in items_of(benchmark)]
    keys = _keys(experiment, benchmark, items, {each.image: "x" for each in items})
    assert fingerprint(keys)[:16] == KEYS[name]
    assert {*KEYS} == {*FILES} == {*WRITERS}


@pytest.fixture(scope="module")
def made(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("asking")
    for name, seed in (("one", 1), ("two", 2)):
        (root / f"{name}.toml").write_text(
            f'extends = "{extracted}"\nbuild = "{root}/build"\nseed = {seed}\n'
        )
        fine("federate", root / f"{name}.toml")
        fine("evaluate", root / f"{name}.toml")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    for path in (tmp_path / "work").glob("*.toml"):
        path.write_text(path.read_text().replace(str(made), str(tmp_path / "work")))
    return tmp_path / "work"


def lines(place: Path, benchmark: str = "", run: str = "one") -> list[dict[str, Any]]:
    (path,) = (place / f"build/scores/study/{run}/answers").glob("projector.*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [row for row in rows if not benchmark or row["benchmark"] == benchmark]


def score(place: Path, benchmark: str, run: str = "one") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / f"build/scores/study/{run}/{benchmark}.json").read_text())
    return content


def setting(benchmark: str, **options: Any) -> list[str]:
    words = []
    for name, value in options.items():
        words += ["--set", f"evaluate.benchmarks.{benchmark}.{name}={json.dumps(value)}"]
    return words


POPE = ("--benchmark", "pope")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt_suffix": " Yes or no?"}, {"prompt_suffix": "' Yes or no?'"}),
        ({"system_prompt": "You look at pictures."}, {"system_prompt": "'You look at pictures.'"}),
        ({"stop": [" ", "."]}, {"stop": "' ', '.'"}),
    ],
)
def test_other_words_are_other_questions_and_are_said(
    options: dict[str, Any], told: dict[str, str], place: Path
) -> None:
    config, before, old = place / "one.toml", lines(place, "pope"), score(place, "pope")
    words = ["--set", "language.question_template=v1", *setting("pope", **options)]
    usual = words[:2]
    fine("evaluate", config, *POPE, *usual)
    v1 = lines(place, "pope")
    assert "are stale" in refused("report", config, *words) or "missing" in refused("report", config, *words)
    fine("evaluate", config, *POPE, *words)
    new = lines(place, "pope")[len(v1) :]
    assert len(new) == len(before)
    assert {row["key"] for row in new}.isdisjoint(row["key"] for row in v1)
    content = score(place, "pope")
    assert content["settings"] == told
    assert content["made_of"]["wording"] == told
    assert content["made_of"]["options"] == old["made_of"]["options"]
    fine("report", config, *words)
    (page,) = place.rglob("report.md")
    assert f"{next(iter(told))}: " in page.read_text()
    fine("evaluate", config, *POPE)
    assert score(place, "pope") == old
    assert "nothing to answer" in fine("evaluate", config, *words)


def test_stop_cuts_what_would_have_been_said(place: Path) -> None:
    config = place / "one.toml"
    whole = {row["id"]: row["answer"] for row in lines(place, "captions")}
    stop = next(iter(whole.values())).split()[1]
    fine("evaluate", config, "--benchmark", "captions", *setting("captions", stop=[stop]))
    after = {row["id"]: row["answer"] for row in lines(place, "captions")[len(whole) :]}
    assert after == {name: answer.split(stop)[0].strip() for name, answer in whole.items()}
    assert cut("a b c ", ()) == "a b c "
    assert cut("a b c b", ("c", "b")) == "a"


def test_a_suffix_stands_in_the_place_of_the_usual_instruction(tmp_path: Path) -> None:
    for name, end in (("pope", "image?"), ("mmbench", "car"), ("vizwiz", "'Unanswerable'.")):
        (tmp_path / name).mkdir()
        benchmark = build(name, tmp_path / name).model_copy(update={"prompt_suffix": "\nBe brief."})
        item = items_of(benchmark)[0]
        asked = benchmark.worded(item).text.turns[-1].content
        assert asked.endswith(f"{end}\nBe brief.")
    assert benchmark.model_copy(update={"prompt_suffix": ""}).worded(item).text.turns[-1].content == (
        "<image>\nWhat is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    )


def test_words_that_nobody_would_say_are_refused(place: Path) -> None:
    config = place / "one.toml"
    for words, message in (
        (
            setting("captions", system_prompt="Be brief."),
            "evaluate.benchmarks.captions.system_prompt: language.template = 'plain' shows the picture alone",
        ),
        (setting("captions", prompt_suffix=" Be brief."), "evaluate.benchmarks.captions.prompt_suffix: "),
        (setting("pope", system_prompt="Be brief."), "its chat template writes it as the assistant's"),
        (setting("loss", system_prompt="Be brief."), "system_prompt has no effect, as no question is asked"),
        (setting("pope", rank=True, stop=["."]), "stop has no effect, as no text is generated"),
        (setting("pope", stop=[""]), "at least 1 character"),
        (setting("pope", system_prompt=""), "at least 1 character"),
    ):
        before = lines(place)
        output = refused("evaluate", config, "--benchmark", words[1].split(".")[2], *words)
        assert message in output
        assert lines(place) == before


TEMPLATES = {
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}": None,
    "{% for m in messages %}{% if m['role'] == 'user' %}[{% if loop.index0 == 1 and messages[0]['role'] == "
    "'system' %}{{ messages[0]['content'] | trim }}\n{% endif %}{{ m['content'] }}]{% elif m['role'] == "
    "'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}": None,
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}": "refuses it: no system here",
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}": (
        "leaves it out"
    ),
    "{% for m in messages %}{{ 'A:' if m['role'] == 'assistant' else 'U:' }}{{ m['content'] }}{% endfor %}": (
        "writes it as the user's"
    ),
}


@pytest.mark.parametrize(("template", "problem"), TEMPLATES.items())
def test_chat_templates_with_and_without_a_place(template: str, problem: str | None) -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template
    if problem is not None:
        with pytest.raises(UserError, match=f"{problem}.*; use 'v1'"):
            require_system_prompt("chat", tokenizer, " Be brief. ")
        return
    require_system_prompt("chat", tokenizer, " Be brief. ")
    turns = (Turn("system", "a red star"), Turn("user", "<image>\na blue ring"), Turn("assistant", "a cross"))
    tokens = tokenise(Text(turns), "chat", tokenizer, patches=2, max_length=99)
    shown = tokenizer.decode([token for token in tokens.ids if token >= 0])
    assert "red star" in shown
    assert "cross" in tokenizer.decode([token for token in tokens.labels if token >= 0])
    assert "star" not in tokenizer.decode([token for token in tokens.labels if token >= 0])


def test_v1_has_it_in_the_place_of_its_own() -> None:
    tokenizer = models.tokenizer()
    turns = (Turn("system", "a red star"), Turn("user", "<image>\na blue ring"))
    ours = tokenise(Text(turns), "v1", tokenizer, patches=2, max_length=99)
    words = tokenizer("a red star USER: ", add_special_tokens=False)["input_ids"]
    assert ours.ids[1 : 1 + len(words) - 1] == words[:-1]
    with pytest.raises(UserError, match="template 'plain' has no place for a system prompt"):
        tokenise(Text(turns), "plain", tokenizer, patches=2, max_length=99)


NAMES = ("pope", "captions", "loss")


def test_a_limited_evaluation_says_so_wherever_its_scores_are(place: Path) -> None:
    config = place / "one.toml"
    whole = {name: score(place, name) for name in NAMES}
    shutil.rmtree(place / "build/scores/study/one")
    output = fine("evaluate", config, "--limit", 5)
    for name in NAMES:
        assert f"{name}: LIMITED to its first 5 questions" in output
        content = score(place, name)
        assert content["counts"]["items"] == 5
        assert content["settings"]["LIMITED"] == "only the first 5 questions"
        assert content["made_of"]["limit"] == 5
        assert all(metric["n"] <= 5 for metric in content["metrics"].values())
    assert "pope, first 5: accuracy" in output
    assert [row["image"] for row in lines(place, "captions")] == [f"scans/{n}.png" for n in range(500, 505)]
    # Scoring again, reporting and comparing are of the same part.
    assert "LIMITED" in fine("score", config)
    assert score(place, "pope")["made_of"]["limit"] == 5
    assert "one, pope: LIMITED: only the first 5 questions" in fine("report", config)
    folder = place / "build/report/study"
    assert (
        json.loads((folder / "report.json").read_text())["runs"]["one"]["details"]["pope"]["made_of"]["limit"]
        == 5
    )
    assert ") first 5 |" in (folder / "report.md").read_text()
    assert "n = 5, first 5 questions" in (folder / "report.html").read_text()
    assert "limit: 5 here, null there" in refused("compare", config, place / "two.toml", *POPE)
    # The rest is asked, nothing is asked twice, and the scores are those of a whole evaluation.
    assert "nothing to answer" in fine("evaluate", config, "--limit", 3)
    part = lines(place)
    fine("evaluate", config)
    assert lines(place)[: len(part)] == part
    assert len({row["key"] for row in lines(place)}) == len(lines(place))
    for name in NAMES:
        assert score(place, name)["counts"] == whole[name]["counts"]
        assert score(place, name)["made_of"].keys() == whole[name]["made_of"].keys()
    assert "LIMITED" not in fine("report", config)


def test_a_part_of_what_is_answered_needs_no_answer_and_leaves_all(place: Path) -> None:
    config, before = place / "one.toml", lines(place)
    whole = {name: score(place, name) for name in NAMES}
    assert "nothing to answer" in fine("evaluate", config, "--limit", 7)
    assert score(place, "pope")["counts"]["items"] == 7
    assert score(place, "pope")["metrics"] != whole["pope"]["metrics"]
    # Scores of a part that lie where whole ones are expected are refused.
    limited = (place / "build/scores/study/one/pope.json").read_text()
    assert "nothing to answer" in fine("evaluate", config)
    assert {name: score(place, name) for name in NAMES} == whole
    assert lines(place) == before
    (place / "build/scores/study/one/pope.json").write_text(limited)
    assert "other questions" in refused("report", config)


def test_a_limit_beyond_the_questions_limits_nothing(place: Path) -> None:
    config, whole = place / "one.toml", score(place, "captions")
    output = fine("evaluate", config, "--limit", 12)
    assert "captions: LIMITED" not in output
    assert "pope: LIMITED to its first 12 questions" in output
    assert score(place, "captions") == whole
    two = place / "two.toml"
    fine("evaluate", two, "--limit", 12)
    assert "pope: LIMITED to the first 12 questions" in fine("compare", config, two)
    refused("evaluate", config, "--limit", 0)


def test_python_takes_a_limit_too(place: Path) -> None:
    scores = fedcmp.load(place / "one.toml").evaluate("pope", limit=4)
    assert scores["pope: accuracy"].n == 4
    assert scores.contents["pope"]["settings"]["LIMITED"] == "only the first 4 questions"


def test_an_option_that_older_scores_lack_makes_no_difference(place: Path) -> None:
    path = place / "build/scores/study/two/captions.json"
    content = json.loads(path.read_text())
    del content["made_of"]["options"]["object_pattern"]
    path.write_text(json.dumps(content))
    output = fine("report", place / "one.toml", place / "two.toml")
    assert "not comparable" not in output
