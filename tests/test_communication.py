"""Compressed updates: what travels, what is made up for, and equal bytes whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_sites import QUICK, SILOS, FakeLink, over, projector, rows, sites_config  # noqa: F401
from test_strategies import SHAPES, draw

from fedcmp.components import load
from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.engines.service import Service
from fedcmp.federate.engines.wire import pack, unpack
from fedcmp.federate.outgoing.compression import compressed, received, restored
from fedcmp.federate.outgoing.kept import Kept
from fedcmp.federate.run import run
from fedcmp.federate.server.progress import Progress
from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Communication, Experiment
from fedcmp.pipeline.errors import DivergedError, UserError
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.run_folder import RESIDUALS

PAYLOADS = {"bfloat16": {}, "int8": {}, "low_rank": {"rank": 1}}


def options(payload: str) -> Communication:
    return Communication(payload=payload, **PAYLOADS[payload])  # type: ignore[arg-type]


def norm(state: State) -> float:
    return float(sum(x.double().square().sum() for x in state.values())) ** 0.5


def test_what_travels_by_hand() -> None:
    x = {"w": torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0]])}
    sent = compressed(x, options("int8"), "")["w"]
    assert sent["levels"].tolist() == [[127, -64, 0], [0, 0, 0]]
    assert sent["levels"].dtype == torch.int8
    assert sent["scale"].tolist() == [[1.0], [0.0]]
    assert restored({"w": sent})["w"].tolist() == [[127.0, -64.0, 0.0], [0.0, 0.0, 0.0]]
    halved = restored(compressed({"w": torch.tensor([1 + 2**-7, 1 + 2**-9])}, options("bfloat16"), ""))["w"]
    assert halved.tolist() == [1 + 2**-7, 1.0]
    east, west = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, -2.0, 2.0, 0.5]])
    thin = compressed({"w": east @ west}, options("low_rank"), "")["w"]
    assert {name: tuple(part.shape) for name, part in thin.items()} == {"left": (2, 1), "right": (4, 1)}
    torch.testing.assert_close(restored({"w": thin})["w"], east @ west)


@pytest.mark.parametrize("payload", PAYLOADS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_what_was_sent_adds_up_to_what_was_learnt(payload: str, seed: int, size: float) -> None:
    """The difference is the last residual, which stays of the size of one update."""
    learnt, there, left = ({name: torch.zeros(shape) for name, shape in SHAPES.items()} for _ in range(3))
    steady = draw(seed)
    for round_ in range(30):
        own = draw(seed + round_ + 1)
        update = {name: size * (steady[name] + 0.3 * own[name]) for name in SHAPES}
        learnt = {name: learnt[name] + update[name] for name in SHAPES}
        asked = {name: update[name] + left[name] for name in SHAPES}
        sent = restored(unpack(pack(compressed(asked, options(payload), f"{seed}/{round_}"))))
        left = {name: asked[name] - sent[name] for name in SHAPES}
        there = {name: there[name] + sent[name] for name in SHAPES}
        assert norm(left) < 6 * norm(update)
    missing = {name: learnt[name] - there[name] for name in SHAPES}
    for name in SHAPES:
        torch.testing.assert_close(missing[name], left[name], rtol=1e-3, atol=1e-4 * size)
    # Without feedback, rank 1 of these matrices would lose about half of them every time.
    assert norm(missing) < 0.2 * norm(learnt)


@pytest.mark.parametrize(("payload", "fewer"), [("bfloat16", 2), ("int8", 3.8), ("low_rank", 15)])
def test_messages_shrink(payload: str, fewer: float) -> None:
    state = {"w": torch.randn(256, 256, generator=torch.Generator().manual_seed(0))}
    sent = pack(compressed(state, Communication(payload=payload), "")).size  # type: ignore[arg-type]
    assert pack(state).size / sent > 0.98 * fewer


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_is_no_number_stays_none_and_nothing_stays_nothing(payload: str) -> None:
    bad = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    back = restored(compressed(bad, options(payload), ""))
    assert not any(bool(torch.isfinite(x).any()) for x in back.values())
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert all(torch.equal(x, zero[n]) for n, x in restored(compressed(zero, options(payload), "")).items())


def test_what_cannot_be_restored_is_refused_by_name() -> None:
    start = draw(0)
    sent = compressed(draw(1), options("int8"), "")
    name = next(iter(sent))
    for spoiled in ({}, {"levels": sent[name]["levels"]}, {"whole": torch.ones(1)}):
        with pytest.raises(ValueError, match="client 'lab' sent an update"):
            received(start, sent | {name: spoiled}, "lab")
    with pytest.raises(ValueError, match="client 'lab' sent an update of other shapes"):
        received(start, {}, "lab")


def test_residuals_of_the_last_two_answers_are_kept(tmp_path: Path) -> None:
    residuals = Kept(tmp_path)
    assert residuals.after("a", None) == {}
    residuals.keep("a", 0, draw(0), None)
    residuals.keep("a-1", 0, draw(9), None)
    residuals.keep("a", 2, draw(2), 0)
    residuals.keep("a", 5, draw(5), 2)
    residuals.keep("a", 5, draw(6), 2)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["2.safetensors", "5.safetensors"]
    assert all(torch.equal(x, draw(2)[name]) for name, x in residuals.after("a", 2).items())
    assert all(torch.equal(x, draw(9)[name]) for name, x in residuals.after("a-1", 0).items())
    with pytest.raises(UserError, match="what client 'a' kept is lost"):
        residuals.after("a", 0)


def compressing(config: Path, build: Path, run_: str, *more: str, payload: str = "int8") -> Experiment:
    chosen = [f"federate.communication.{name}={value}" for name, value in PAYLOADS[payload].items()]
    chosen += [f"federate.communication.payload={payload}", f"build={build}", f"run={run_}", *QUICK]
    return load(config, [*chosen, *more])


def sites_of(experiment: Experiment, kind: type[Service] = Service) -> FakeLink:
    return FakeLink({node: kind(experiment, silo) for node, silo in enumerate(SILOS)})


def travelled(experiment: Experiment) -> list[dict]:
    lines = (experiment.run_path / "history.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["client"] is None]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_sites_end_in_the_bytes_of_the_local_engine(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
    payload: str,
) -> None:
    more = ["federate.strategy.name=fedcmp", "federate.clients_per_round=2"]
    local, remote = (compressing(sites_config, tmp_path, n, *more, payload=payload) for n in ("l", "r"))
    run(local)
    run(remote, over(sites_of(remote)))
    assert projector(local) == projector(remote)
    assert rows(local) == rows(remote)
    plain = load(sites_config, [f"build={tmp_path}", "run=p", *more, *QUICK])
    run(plain, over(sites_of(plain)))
    assert projector(plain) != projector(remote)
    theirs, ours = (load_file(each.run_path / "projector.safetensors") for each in (plain, remote))
    moved = norm({name: ours[name] - x for name, x in theirs.items()}) / norm(theirs)
    assert moved < {"bfloat16": 0.05, "int8": 0.05, "low_rank": 0.5}[payload]
    back = [sum(row["bytes_received"] for row in travelled(each)) for each in (plain, remote)]
    assert back[0] > {"bfloat16": 1.5, "int8": 1.8, "low_rank": 1.8}[payload] * back[1]
    assert not (local.run_path / RESIDUALS).exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_killed_and_rerun_ends_in_the_same_bytes(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
    payload: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after the clients have trained and before the round counts, and after it has."""
    straight, stopped = (compressing(sites_config, tmp_path, n, payload=payload) for n in ("a", "b"))
    run(straight)
    save = Progress.save
    for dies in (1, 2, 3):

        def dying(self: Progress, path: Path, fingerprint: str, dies: int = dies) -> None:
            if self.round == dies:
                raise KeyboardInterrupt
            save(self, path, fingerprint)

        monkeypatch.setattr(Progress, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    monkeypatch.setattr(Progress, "save", save)
    run(stopped)
    assert projector(straight) == projector(stopped)


def test_an_answer_that_did_not_count_is_sent_again(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A site whose answer of a round is lost goes on as one that was not there in that round."""

    class Mute(Service):
        trains = True

        def handle(self, request: dict) -> dict:
            lost = request["kind"] == "train" and request["job"]["round"] == 1
            if lost and not self.trains:
                raise ValueError("gone")
            answer = super().handle(request)
            if lost:
                raise ValueError("gone")
            return answer

    class Away(Mute):
        trains = False

    ends = []
    for kind in (Mute, Away):
        experiment = compressing(sites_config, tmp_path, kind.__name__, "sites.quorum=2")
        link = sites_of(experiment)
        link.services[1] = kind(experiment, "lab")
        run(experiment, over(link))
        ends.append(projector(experiment))
    assert ends[0] == ends[1]


def test_a_site_that_lost_its_residual_says_so(sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    experiment = compressing(sites_config, tmp_path, "lost")
    link = sites_of(experiment)

    def losing(node: int) -> None:
        for path in (experiment.run_path / RESIDUALS / "lab").glob("*"):
            path.unlink()

    link.on_train = losing
    with pytest.raises(UserError, match="what client 'lab' kept is lost"):
        run(experiment, over(link))


def test_it_is_part_of_what_a_run_is_and_the_default_is_not(sites_config: Path) -> None:  # noqa: F811
    plain, named, other = (
        run_identity(load(sites_config, overrides))
        for overrides in (
            [],
            ["federate.communication.payload=float32"],
            ["federate.communication.payload=int8"],
        )
    )
    assert plain == named
    before = {**plain, "federate": {k: v for k, v in plain["federate"].items() if k != "communication"}}
    assert differences(plain, before) == []
    assert differences(other, plain)


@pytest.mark.parametrize(
    ("privacy", "why"),
    [("secure=true", "secure sums are of exact numbers"), ("clip=1.0", "must not be sent later")],
)
def test_what_must_be_exact_is_not_compressed(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
    privacy: str,
    why: str,
) -> None:
    experiment = compressing(sites_config, tmp_path, "no", f"federate.privacy.{privacy}")
    with pytest.raises(UserError, match=f"payload = 'int8': .*{why}"):
        run(experiment)


def test_poison_is_refused_by_name(sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    for payload in PAYLOADS:
        experiment = compressing(
            sites_config, tmp_path, payload, "federate.poison.lab.kind=not_finite", payload=payload
        )
        with pytest.raises(DivergedError, match="client 'lab' sent values that are not finite"):
            run(experiment)
