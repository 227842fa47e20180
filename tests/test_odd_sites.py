"""Sites that say odd things: their own failure, and nobody else's."""

from __future__ import annotations

import copy
import json
import math
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sites import SILOS, FakeLink, over, projector, sites_config  # noqa: F401

from fedcmp.components import load
from fedcmp.federate.engines.base import SiloCard, terms
from fedcmp.federate.engines.link import Failure
from fedcmp.federate.engines.service import Service
from fedcmp.federate.engines.sites import Sites
from fedcmp.federate.engines.wire import Payload
from fedcmp.federate.outgoing.compression import compressed
from fedcmp.federate.run import run
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError

Change = Callable[[dict[str, Any]], Any]


class Said:
    """A site that says again what an honest one said, changed or not."""

    def __init__(self, said: dict[str, Any], changes: Iterator[Change] | None = None) -> None:
        self.said, self._changes = said, changes

    def handle(self, request: dict[str, Any]) -> Any:
        answer = copy.deepcopy(self.said[request["kind"]])
        if self._changes is None or request["kind"] == "hello":
            return answer
        changed = next(self._changes)(answer)
        return answer if changed is None else changed


def put(*path: Any) -> Change:
    """Set what the path leads to, to its last part."""

    def change(answer: dict[str, Any]) -> None:
        *steps, last, value = path
        for step in steps:
            answer = answer[step]
        answer[last] = value

    return change


def result(name: str, value: Any) -> Change:
    return put("result", name, value)


def tensor(change: Callable[[torch.Tensor], Any]) -> Change:
    def changed(answer: dict[str, Any]) -> None:
        state = answer["result"]["state"]
        name = next(name for name, each in state.items() if each.ndim == 2)
        state[name] = change(state[name])

    return changed


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def dropped(name: str) -> Change:
    def change(answer: dict[str, Any]) -> None:
        del answer["result"][name]

    return change


def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(each: torch.Tensor) -> torch.Tensor:
        each = each.clone()
        each.view(-1)[3] = value
        return each

    return change


COUNTS = [0, -1, 10**15, 2**70, 1.0, 1.5, "5", None, True, [], {}, float("nan"), torch.tensor(3)]
NUMBERS = [math.nan, math.inf, -math.inf, "0.5", None, [], [0.5], {}, True, torch.ones(1)]
ANSWERS: dict[str, Change] = {
    **{
        f"{name}={value!r}": result(name, value)
        for name in ("samples", "steps", "tokens")
        for value in COUNTS
    },
    **{f"loss={value!r}": result("loss", value) for value in NUMBERS},
    **{f"seconds={value!r}": result("seconds", value) for value in (math.nan, math.inf, -1.0, "1", None)},
    **{
        f"state={value!r}": result("state", value)
        for value in (1, None, [], {}, "x", {"a": 1}, torch.ones(2))
    },
    **{f"sent={value!r}": result("sent", value) for value in (1, {}, {"a": {"whole": torch.ones(1)}})},
    **{f"gradient={value!r}": result("gradient", value) for value in ({"a": torch.ones(9)}, 3, [1])},
    **{f"alignment={value!r}": result("alignment", value) for value in ({"a": 0.5}, {"a": math.nan}, 1)},
    **{f"optimizer={value!r}": result("optimizer", value) for value in ({"a": torch.ones(9)}, 1, [1])},
    **{f"without {name}": dropped(name) for name in ("loss", "state", "samples", "client", "recalled")},
    "recalled=2": result("recalled", 2),
    "client=[]": result("client", []),
    "more": result("more", 1),
    "float8": tensor(lambda x: x.to(torch.float8_e4m3fn)),
    "float16": tensor(lambda x: x.half()),
    "float64": tensor(lambda x: x.double()),
    "complex": tensor(lambda x: x.to(torch.complex64)),
    "bool": tensor(lambda x: x > 0),
    "int": tensor(lambda x: x.long()),
    "transposed": tensor(lambda x: x.T.contiguous()),
    "broadcast": tensor(lambda x: x[:1]),
    "scalar": tensor(lambda x: x.sum()),
    "empty": tensor(lambda x: x[:0]),
    "a list": tensor(lambda x: x.tolist()),
    "nan": tensor(spoiled(math.nan)),
    "inf": tensor(spoiled(math.inf)),
    "nested": result("optimizer", nested(90)),
    "a list instead": lambda answer: [answer],
    "nothing": lambda answer: {},
    "a number": lambda answer: 7,
    "a text": lambda answer: "result",
    "a tensor": lambda answer: torch.ones(3),
    "two results": put("other", 1),
}
GREETINGS: dict[str, Change] = {
    **{
        f"silo={value!r}": put("silo", value) for value in ([], None, 1, {}, "x" * 10**6, "\ud800", "\x1b[2J")
    },
    **{f"d_llm={value!r}": put("d_llm", value) for value in (0, -1, 2**40, 64, 1.5, "32", None, math.nan)},
    **{f"card={value!r}": put("card", value) for value in ([], None, {}, 1, {"content": 1})},
    **{
        f"terms={value!r}": put("terms", value)
        for value in ([], None, {}, {1: 2}, {"seed": math.inf}, nested(90))
    },
    **{
        f"{name}={value!r}": put("card", name, value)
        for name in ("patches", "d_vision", "samples")
        for value in (0, 2**60, "3", None, math.inf)
    },
    **{f"content={value!r}": put("card", "content", value) for value in ("", "x", 1, None, "0" * 65)},
    **{
        f"key={value!r}": put("card", "key", value)
        for value in ([], None, {1: 2, "a": 3}, {"a": torch.ones(1)})
    },
    **{
        f"language={value!r}": put("card", "language", value) for value in ([], {}, {"files": {}}, nested(90))
    },
    "wider": put("card", "d_vision", 2**14),
    "more": put("more", 1),
    "a list instead": lambda answer: [answer],
    "nothing": lambda answer: {},
    "a number": lambda answer: 7,
}


@pytest.fixture(scope="module")
def spoken(sites_config: Path) -> dict[str, dict[str, Any]]:  # noqa: F811
    """What three honest sites say of themselves and answer in a first round."""
    experiment = load(sites_config, ["federate.rounds=1"])
    said: dict[str, dict[str, Any]] = {}

    class Heard(Service):
        def handle(self, request: dict[str, Any]) -> dict[str, Any]:
            answer = super().handle(request)
            said.setdefault(self.silo, {})[request["kind"]] = copy.deepcopy(answer)
            return answer

    with tempfile.TemporaryDirectory() as build:
        once = load(sites_config, ["federate.rounds=1", f"build={build}"])
        run(once, over(FakeLink({node: Heard(experiment, silo) for node, silo in enumerate(SILOS)})))
    return said


def rounds_of(
    config: Path, spoken: dict[str, dict[str, Any]], build: Path, changes: list[Change], *more: str
) -> Experiment:
    """As many rounds as changes, of which 'lab' changes its answers."""
    options = [f"federate.rounds={len(changes)}", "sites.quorum=2", "sites.join_timeout=5"]
    experiment = load(config, [*options, f"build={build}", *more])
    for said in spoken.values():
        card = SiloCard(**said["hello"]["card"])
        said["hello"]["terms"] = terms(experiment, card)
    sites = {
        node: Said(spoken[silo], iter(changes) if silo == "lab" else None) for node, silo in enumerate(SILOS)
    }
    run(experiment, over(FakeLink(sites)))  # type: ignore[arg-type]
    return experiment


def finite(experiment: Experiment) -> list[dict[str, Any]]:
    """The history, which holds nothing that JSON does not know."""

    def no(constant: str) -> None:
        raise AssertionError(f"{constant} in the history")

    text = (experiment.run_path / "history.jsonl").read_text()
    return [json.loads(line, parse_constant=no) for line in text.splitlines()]


def silent(answer: dict[str, Any]) -> None:
    raise UserError("nothing today")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcmp.federate.engines.sites._POLL", 0.005)


@pytest.mark.usefixtures("quick")
def test_odd_answers_are_one_sites_failure(
    sites_config: Path,  # noqa: F811
    spoken: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """The run goes on with the others and ends in the bytes of a run where that site said nothing."""
    odd = rounds_of(sites_config, spoken, tmp_path, list(ANSWERS.values()), "run=odd")
    missing = {row["round"]: row["missing"] for row in finite(odd) if row["client"] is None}
    accepted = [name for number, name in enumerate(ANSWERS) if missing[number] != ["lab"]]
    assert accepted == []
    none = rounds_of(sites_config, spoken, tmp_path, [silent] * len(ANSWERS), "run=none")
    assert projector(odd) == projector(none)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("payload", ["low_rank", "int8", "bfloat16"])
def test_compressed_updates_have_their_shapes_before_anything_is_computed(
    payload: str,
    sites_config: Path,  # noqa: F811
    spoken: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """A few hundred kilobytes can stand for gigabytes: U of many rows times V of many."""
    options = [f"federate.communication={{payload='{payload}',rank=2}}"]
    once = load(sites_config, options)
    said = copy.deepcopy(spoken)
    for each in said.values():
        state = each["train"]["result"]["state"]
        sent = compressed({name: 1e-3 * x for name, x in state.items()}, once.federate.communication, "x")
        each["train"]["result"] |= {"state": {}, "sent": sent}

    def sent(make: Callable[[dict[str, Any]], Any]) -> Change:
        def change(answer: dict[str, Any]) -> None:
            parts = answer["result"]["sent"]
            name = max(parts, key=lambda name: sum(x.numel() for x in parts[name].values()))
            parts[name] = make(parts[name])

        return change

    changes = [
        sent(lambda parts: {"left": torch.ones(30_000, 1), "right": torch.ones(30_000, 1)}),
        sent(lambda parts: {"left": torch.ones(10, 2), "right": torch.ones(10, 3)}),
        sent(lambda parts: {"left": torch.ones(3), "right": torch.ones(3)}),
        sent(
            lambda parts: {"levels": torch.ones(30_000, 1, dtype=torch.int8), "scale": torch.ones(1, 30_000)}
        ),
        sent(lambda parts: {"whole": torch.ones(1).expand(5, 5).contiguous()}),
        sent(lambda parts: {name: x.double() for name, x in parts.items()}),
        sent(lambda parts: {name: x * math.nan for name, x in parts.items() if x.is_floating_point()}),
        sent(lambda parts: {}),
        sent(lambda parts: parts | {"more": torch.ones(1)}),
        sent(lambda parts: torch.ones(1)),
        sent(lambda parts: [1]),
        result("sent", None),
        result("sent", {}),
        result("state", spoken["lab"]["train"]["result"]["state"]),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run_ = rounds_of(sites_config, said, tmp_path, [lambda answer: None, *changes], *options)
    missing = [row["missing"] for row in finite(run_) if row["client"] is None]
    assert missing == [[], *[["lab"]] * len(changes)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


@pytest.mark.usefixtures("quick")
def test_odd_greetings_do_not_end_the_server(
    sites_config: Path,  # noqa: F811
    spoken: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the first start all sites are needed; that one is missing is said, as are the others' names."""
    experiment = load(sites_config, [f"build={tmp_path}", "sites.join_timeout=0.1"])
    for said in spoken.values():
        said["hello"]["terms"] = terms(experiment, SiloCard(**said["hello"]["card"]))
    for name, change in GREETINGS.items():
        hello = copy.deepcopy(spoken["lab"]["hello"])
        changed = change(hello)
        odd = Said({"hello": hello if changed is None else changed})
        # In either order: whoever comes first is not always right.
        sites = {0: odd, 1: Said(spoken["clinic"]), 2: Said(spoken["practice"])}
        with pytest.raises(UserError, match="lab"):
            run(experiment, over(FakeLink(sites)))  # type: ignore[arg-type]
        said_ = capsys.readouterr().out
        assert "clinic is here" in said_, name
        assert "practice is here" in said_, name


@pytest.mark.usefixtures("quick")
def test_a_wrong_site_that_comes_first_does_not_turn_away_the_others(
    sites_config: Path,  # noqa: F811
    spoken: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What only sites know is what most of them say, when all have spoken; later the run's is."""
    monkeypatch.setattr("fedcmp.federate.engines.sites._NODES_EVERY", 0.01)

    class OneByOne(FakeLink):
        """A site comes when those before it have been heard."""

        heard = 0

        def nodes(self) -> set[int]:
            return set(list(self.services)[: 1 + self.heard])

        def receive(self, messages: Iterable[str]) -> dict[str, Payload | Failure]:
            answers = super().receive(messages)
            self.heard += len(answers)
            return answers

    experiment = load(sites_config, ["federate.rounds=1", "sites.quorum=2", f"build={tmp_path}"])
    for said in spoken.values():
        said["hello"]["terms"] = terms(experiment, SiloCard(**said["hello"]["card"]))
    wrong = copy.deepcopy(spoken["lab"])
    wrong["hello"]["d_llm"] *= 2
    order = {1: Said(wrong), 0: Said(spoken["clinic"]), 2: Said(spoken["practice"])}
    with pytest.raises(
        UserError, match=r"^site 'lab' has agreed to something else .*site 'clinic' \(d_llm: "
    ):
        run(experiment, over(OneByOne(order)))  # type: ignore[arg-type]
    heard = capsys.readouterr().out
    assert heard.index("lab is here") < heard.index("clinic is here") < heard.index("site 'lab' has agreed")


@pytest.mark.usefixtures("quick")
def test_a_site_cannot_take_the_name_of_another(
    sites_config: Path,  # noqa: F811
    spoken: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The key that it signs with says whose site it is; the true one takes part."""
    experiment = load(sites_config, ["federate.rounds=1", "sites.quorum=2", f"build={tmp_path}"])
    for said in spoken.values():
        said["hello"]["terms"] = terms(experiment, SiloCard(**said["hello"]["card"]))
    owners = {**dict(enumerate(SILOS)), 7: "former"}
    false = copy.deepcopy(spoken["lab"])
    false["hello"]["card"]["content"] = "0" * 64
    # Node 7 comes before and after the true one.
    for nodes in ([7, 0, 1, 2], [0, 1, 2, 7]):
        sites = {node: Said(false if node == 7 else spoken[SILOS[node]]) for node in nodes}
        link = FakeLink(sites)  # type: ignore[arg-type]
        run(experiment, lambda own, _, link=link: Sites(own, link, owners))
        assert "site 'former' says that it is 'lab' and is refused" in capsys.readouterr().out
        assert [row["missing"] for row in finite(experiment) if row["client"] is None] == [[]]
        assert {node for node, kind in link.sent if kind == "train"} == {0, 1, 2}
        shutil.rmtree(experiment.run_path)
    sites = {0: Said(spoken["clinic"]), 1: Said(spoken["clinic"]), 2: Said(spoken["practice"])}
    short = load(sites_config, ["federate.rounds=1", "sites.join_timeout=0.5", f"build={tmp_path}"])
    with pytest.raises(UserError, match="missing: lab"):
        run(short, lambda own, _: Sites(own, FakeLink(sites), owners))  # type: ignore[arg-type]
    assert "site 'lab' says that it is 'clinic' and is refused" in capsys.readouterr().out
