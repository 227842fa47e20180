"""Local training: alone or together, with an objective, recalled; and who takes part when."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_plan import counted

from fedcmp.components import load
from fedcmp.federate.arithmetic.paths import path_projector
from fedcmp.federate.arithmetic.updates import Objective, State
from fedcmp.federate.client.division import micro_batches
from fedcmp.federate.client.memo import Memo, job_key
from fedcmp.federate.client.step import learning_rate, train_together
from fedcmp.federate.client.stream import Batch, Stream
from fedcmp.federate.client.trainer import Trainer
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.schedule import participants
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Optimizer
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import IGNORE_INDEX
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component

PLAIN_SGD = Optimizer(name="sgd", learning_rate=0.5, warmup=0, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def language(llama_dir: Path) -> FrozenLanguageModel:
    return FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def streams(extracted: Path, language: FrozenLanguageModel) -> dict[str, Stream]:
    """20 and 18 samples, so that one client has a step more than the other."""
    experiment = load(extracted)
    return {
        name: Stream(
            {name: FeatureCache(experiment.cache_path(name))},
            language,
            template="plain",
            max_length=99,
            batch_size=6,
            turns=1,
            seed=0,
        )
        for name in ("clinic", "lab")
    }


def module(name: str = "mlp2x_gelu") -> torch.nn.Module:
    projector = projectors.build(Component(name=name), d_vision=24, d_llm=32)
    projectors.initialise(projector, torch.Generator().manual_seed(0))
    return projector


def state() -> State:
    return projectors.state_of(module())


def job(client: str = "clinic", **changes: object) -> Job:
    return Job(**{"client": client, "start": state(), "turn": 0, "round": 0, "rounds": 100} | changes)  # type: ignore[arg-type]


def train(
    jobs: Sequence[Job],
    streams: dict[str, Stream],
    language: FrozenLanguageModel,
    options: Optimizer = PLAIN_SGD,
    micro_batch: int = 6,
    micro_tokens: int | None = None,
) -> list[LocalResult]:
    parts = [(streams[each.client].steps(0), streams[each.client].batches(0)) for each in jobs]
    return train_together(
        jobs,
        parts,
        VisionLanguage(module(), language),
        options,
        micro_batch=micro_batch,
        micro_tokens=micro_tokens,
        advance=lambda number: None,
    )


def assert_close(ours: State, theirs: State, tolerance: float = 1e-5) -> None:
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12), st.none() | st.integers(1, 200)
)
def test_micro_batches_have_every_text_once_and_no_more_than_they_may(
    lengths: list[int], samples: int, tokens: int | None
) -> None:
    labels = torch.full((len(lengths), 50), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        labels[row, length - 1] = 7
    parts = micro_batches(labels, samples, tokens)
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(len(lengths)))
    for rows, length in parts:
        assert length == max(lengths[row] for row in rows)
        assert len(rows) <= samples
        assert tokens is None or len(rows) == 1 or len(rows) * length <= tokens
    cuts = [length for _, length in parts]
    assert cuts == sorted(cuts)
    # None of them would have had room for the next one's shortest text.
    for (rows, _), (following, _) in pairwise(parts):
        shortest = min(lengths[row] for row in following)
        assert len(rows) == samples or (tokens is not None and (len(rows) + 1) * shortest > tokens)


@pytest.mark.parametrize("micro_tokens", [1, 60, 10_000])
def test_a_bound_on_tokens_changes_no_gradient(streams, language, micro_tokens: int) -> None:  # type: ignore[no-untyped-def]
    whole, parts = (
        train([job()], streams, language, micro_batch=99, micro_tokens=most)[0]
        for most in (None, micro_tokens)
    )
    assert_close(parts.state, whole.state)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    options = Optimizer(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(options, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_the_learning_rate_follows_the_round_not_the_turn(streams, language) -> None:  # type: ignore[no-untyped-def]
    name, start = "linear_2.weight", state()
    results = [train([job(round=round_)], streams, language)[0] for round_ in (0, 99)]
    early, late = (float((result.state[name] - start[name]).norm()) for result in results)
    assert late < 0.01 * early


def test_the_loss_falls_and_the_llm_stays(streams, language) -> None:  # type: ignore[no-untyped-def]
    before = {name: tensor.clone() for name, tensor in language.model.state_dict().items()}
    options = Optimizer(learning_rate=1e-2, warmup=0, carry=True)
    losses, current, moments = [], state(), None
    for _ in range(6):
        (result,) = train([job(start=current, optimizer=moments)], streams, language, options)
        current, moments = result.state, result.optimizer
        losses.append(result.loss)
    assert losses[-1] < losses[0] - 0.02
    assert (result.samples, result.steps) == (20, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in language.model.state_dict().items())


@pytest.mark.parametrize(("clients", "micro_batch"), [(1, 3), (1, 99), (2, 5)])
def test_flops_are_those_that_torch_counts(streams, language, clients: int, micro_batch: int) -> None:  # type: ignore[no-untyped-def]
    jobs = [job(client) for client in ("clinic", "lab")[:clients]]
    with counted() as counter:
        results = train(jobs, streams, language, micro_batch=micro_batch)
    assert sum(result.flops or 0 for result in results) == pytest.approx(counter.get_total_flops(), rel=0.08)


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 99])
@pytest.mark.parametrize("options", [PLAIN_SGD, Optimizer(learning_rate=1e-2, max_grad_norm=0.01)])
def test_together_is_as_alone(streams, language, micro_batch: int, options: Optimizer) -> None:  # type: ignore[no-untyped-def]
    """Also where one client has more steps and a smaller last batch than the other."""
    jobs = [job("clinic"), job("lab", start={name: 0.9 * t for name, t in state().items()})]
    together = train(jobs, streams, language, options, micro_batch)
    for one, both in zip(jobs, together, strict=True):
        (alone,) = train([one], streams, language, options)
        assert (both.client, both.samples, both.steps, both.tokens) == (
            one.client,
            alone.samples,
            alone.steps,
            alone.tokens,
        )
        assert both.loss == pytest.approx(alone.loss, rel=1e-5)
        # Adam divides by the square root of tiny squares, which magnifies rounding.
        assert_close(both.state, alone.state, 1e-5 if options.name == "sgd" else 1e-3)


def test_gradients_are_those_of_the_mean_token_loss(streams, language) -> None:  # type: ignore[no-untyped-def]
    """One SGD step by hand, through transformers' own loss."""

    class OneBatch(Stream):
        def __init__(self) -> None: ...

        def steps(self, turn: int) -> int:
            return 1

        def batches(self, turn: int):  # type: ignore[no-untyped-def]
            yield batch

    batch: Batch = next(streams["clinic"].batches(0))
    (result,) = train([job(wants=frozenset({"gradient"}))], {"clinic": OneBatch()}, language, micro_batch=2)
    projector = module()
    embeds = language.embed(batch.ids, projector(batch.features))
    language.model(inputs_embeds=embeds, labels=batch.labels).loss.backward()
    assert result.gradient is not None
    for name, parameter in projector.named_parameters():
        torch.testing.assert_close(result.gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(result.state[name], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_explains_the_path(streams, language) -> None:  # type: ignore[no-untyped-def]
    """SCAFFOLD's option II: with plain SGD the mean gradient is the update over the summed rates."""
    (result,) = train([job(wants=frozenset({"gradient"}))], streams, language)
    total = sum(learning_rate(PLAIN_SGD, step, 400) for step in range(4))
    rates = [learning_rate(PLAIN_SGD, step, 400) for step in range(4)]
    assert max(rates) - min(rates) < 1e-3
    assert result.gradient is not None
    moved = {name: (start - result.state[name]) / total for name, start in state().items()}
    assert_close(moved, result.gradient, 1e-4)


def test_a_path_projector_lies_along_the_mean_gradient(streams, language) -> None:  # type: ignore[no-untyped-def]
    """As far from the start as AdamW ended, against the gradient that SCAFFOLD's clients send too."""
    options, pull = Optimizer(learning_rate=1e-2), Objective(proximal=0.5)
    (ended,) = train([job(objective=pull, wants=frozenset({"gradient"}))], streams, language, options)
    (sent,) = train([job(objective=pull, update="path")], streams, language, options)
    assert sent.gradient is None
    assert (sent.loss, sent.samples, sent.tokens) == (ended.loss, ended.samples, ended.tokens)
    assert ended.gradient is not None
    for name, start in state().items():
        direction = ended.gradient[name] / ended.gradient[name].norm()
        length = (ended.state[name] - start).norm()
        torch.testing.assert_close(sent.state[name], start - length * direction, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(sent.state[name], ended.state[name], atol=1e-4)


def test_with_plain_sgd_a_path_projector_is_where_the_path_ended(streams, language) -> None:  # type: ignore[no-untyped-def]
    """The steps add up to the mean gradient, as long as their rates are about equal."""
    (ended,) = train([job()], streams, language)
    (sent,) = train([job(update="path")], streams, language)
    assert_close(sent.state, ended.state, 1e-4)


def test_a_parameter_without_a_gradient_stays_where_it_ended() -> None:
    start, end = {"w": torch.ones(2, 3), "b": torch.ones(2)}, {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    gradient = {"w": torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]), "b": torch.zeros(2)}
    sent = path_projector(start, end, gradient)
    assert torch.equal(sent["b"], end["b"])
    torch.testing.assert_close(sent["w"], start["w"] - 6**0.5 * gradient["w"] / 5)


def test_a_linear_term_shifts_every_gradient(streams, language) -> None:  # type: ignore[no-untyped-def]
    linear = {name: torch.full_like(tensor, 0.03) for name, tensor in state().items()}
    one_step = {"clinic": streams["clinic"]}
    (plain,) = train([job()], one_step, language)
    (shifted,) = train([job(objective=Objective(linear=linear))], one_step, language)
    total = sum(learning_rate(PLAIN_SGD, step, 400) for step in range(4))
    difference = shifted.state["linear_1.weight"] - plain.state["linear_1.weight"]
    assert float(difference.mean()) == pytest.approx(-0.03 * total, rel=0.05)


def test_a_proximal_term_holds_clients_back(streams, language) -> None:  # type: ignore[no-untyped-def]
    start = state()

    def distance(mu: float) -> float:
        (result,) = train([job(objective=Objective(proximal=mu))], streams, language)
        return sum(float((result.state[name] - start[name]).norm()) for name in start)

    assert distance(0.0) > distance(0.5) > distance(1.5)


def test_a_diverging_client_is_named(streams, language) -> None:  # type: ignore[no-untyped-def]
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in state().items()}
    with pytest.raises(ValueError, match=r"client 'lab', round 0: .*lower federate\.optimizer"):
        train([job("clinic"), job("lab", start=broken)], streams, language)


def engine(streams, language, memo: Memo | None, together: int = 1) -> Trainer:  # type: ignore[no-untyped-def]
    return Trainer(
        streams,
        VisionLanguage(module(), language),
        PLAIN_SGD,
        batch_size=6,
        together=together,
        micro_batch=6,
        memo=memo,
        advance=lambda number: None,
    )


@pytest.mark.parametrize("together", [1, 2])
def test_equal_training_is_recalled_bit_for_bit(streams, language, tmp_path, together: int) -> None:  # type: ignore[no-untyped-def]
    jobs = [job("clinic"), job("lab")]
    memo = Memo(tmp_path, 10**9, {"llm": 1})
    first = engine(streams, language, memo, together)(jobs)
    again = engine(streams, language, Memo(tmp_path, 10**9, {"llm": 1}), together)(jobs)
    assert [result.recalled for result in (*first, *again)] == [False, False, True, True]
    for ours, theirs in zip(first, again, strict=True):
        assert (ours.client, ours.loss, ours.samples, ours.steps) == (
            theirs.client,
            theirs.loss,
            theirs.samples,
            theirs.steps,
        )
        assert all(torch.equal(ours.state[name], theirs.state[name]) for name in ours.state)
    for changed in (
        job(round=1),
        job(rounds=99),
        job(objective=Objective(0.1)),
        job(objective=Objective(linear=state())),
        job(start={name: tensor + 1e-6 for name, tensor in state().items()}),
        job(wants=frozenset({"gradient"})),
        job(update="path"),
    ):
        assert not engine(streams, language, memo)([changed])[0].recalled
    assert not engine(streams, language, Memo(tmp_path, 10**9, {"llm": 2}))([job()])[0].recalled


def test_what_another_is_training_is_waited_for(streams, language, tmp_path) -> None:  # type: ignore[no-untyped-def]
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Trainer):
        def train(self, jobs: Sequence[Job]) -> list[LocalResult]:
            begun.set()
            assert go_on.wait(60)
            return super().train(jobs)

    with ThreadPoolExecutor(2) as pool:
        slow = Slow(**vars(engine(streams, language, Memo(tmp_path, 10**9, {}))))
        first = pool.submit(slow, [job()])
        assert begun.wait(60)
        second = pool.submit(engine(streams, language, Memo(tmp_path, 10**9, {})), [job()])
        with pytest.raises(TimeoutError):
            second.result(0.3)
        go_on.set()
        ours, theirs = first.result()[0], second.result()[0]
    assert (ours.recalled, theirs.recalled) == (False, True)
    assert all(torch.equal(ours.state[name], theirs.state[name]) for name in ours.state)


def test_a_torn_memo_is_trained_again(streams, language, tmp_path) -> None:  # type: ignore[no-untyped-def]
    memo = Memo(tmp_path, 10**9, {})
    engine(streams, language, memo)([job()])
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert not engine(streams, language, memo)([job()])[0].recalled
    assert engine(streams, language, memo)([job()])[0].recalled


def test_a_full_memo_forgets_what_was_not_used_for_longest(tmp_path: Path) -> None:
    result = LocalResult("a", state(), 1.0, 1, 1, 1, 1.0)
    buffer = io.BytesIO()
    torch.save([vars(result)], buffer)
    memo = Memo(tmp_path, 5 * buffer.tell(), {})
    keys = [[{"number": number}] for number in range(12)]
    for key in keys:
        memo.keep(key, [result])
        assert memo.recall(keys[0]) is not None
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 5 * buffer.tell()
    assert memo.recall(keys[-1]) is not None
    assert memo.recall(keys[1]) is None


@pytest.mark.skipif("not config.getoption('--slow')")
def test_processes_may_share_a_full_memo(tmp_path: Path) -> None:
    """Each writes, recalls and makes room while the others do; nobody stumbles or reads half a file."""
    code = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from fedcmp.federate.client.step import LocalResult\nfrom fedcmp.federate.client.memo import Memo\n"
        "memo, me = Memo(Path(sys.argv[1]), 1_000_000, {}), int(sys.argv[2])\n"
        "for number in range(60):\n"
        "    state = {'w': torch.full((20_000,), float(number))}\n"
        "    memo.keep([{'n': number % 20}], [LocalResult('a', state, 1.0, 1, 1, 1, 1.0)])\n"
        "    found = memo.recall([{'n': (number + me) % 20}])\n"
        "    assert found is None or found[0].state['w'].unique().numel() == 1\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(me)], cwd=ROOT) for me in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    assert not list(tmp_path.glob(".tmp-*"))


def test_job_keys_are_plain_json() -> None:
    key = job_key(job(objective=Objective(0.5, state()), wants=frozenset({"alignment"})))
    assert key["proximal"] == 0.5
    assert key["gradient"] is False
    assert len(key["start"]) == len(key["linear"]) == 64


@given(number=st.integers(1, 30), rounds=st.integers(0, 40), size=st.integers(1, 40), seed=st.integers(0, 9))
def test_all_take_part_about_equally_often(number: int, rounds: int, size: int, seed: int) -> None:
    clients = [f"c{k:02d}" for k in range(number)]
    schedule = participants(clients, rounds, size, seed)
    assert schedule == participants(clients, rounds, size, seed)
    assert all(len(chosen) == len(set(chosen)) == min(size, number) for chosen in schedule)
    assert all(chosen == sorted(chosen) for chosen in schedule)
    counts = Counter(client for chosen in schedule for client in chosen)
    times = [counts[client] for client in clients]
    assert max(times) - min(times) <= 1


def test_everyone_by_default() -> None:
    assert participants(["b", "a"], 3, None, 0) == [["b", "a"]] * 3
    drawn = [tuple(participants([str(k) for k in range(9)], 1, 3, seed)[0]) for seed in range(20)]
    assert len(set(drawn)) > 5
