"""PivotMerge's invariants (docs/merging.md), alignment, and `fedcmp merge` on real files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcmp.cli import main
from fedcmp.federate.arithmetic.updates import Measure, State, Update
from fedcmp.federate.client.alignment import alignment_contributions, linear_cka
from fedcmp.federate.client.stream import Batch, Stream
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.federate.strategies.pivotmerge import PivotMerge, layer_weights
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import IGNORE_INDEX
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component

D_VISION, D_LLM = 24, 32
SHAPES = {"linear_1.weight": (6, 4), "linear_1.bias": (6,), "linear_2.weight": (6, 6), "linear_2.bias": (6,)}
MATRICES = ("linear_1.weight", "linear_2.weight")


def allowed(name: str) -> bool:
    strategy = STRATEGIES.build(Component(name=name), name)
    return not strategy.pooled and not strategy.local and not strategy.wants - {"alignment"}


METHODS = [name for name in STRATEGIES.names() if allowed(name)]


def draw(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def clients(number: int, seed: int = 0) -> list[Update]:
    return [Update(f"c{k}", draw(100 * seed + k + 1), 3 * k + 1) for k in range(number)]


def aligned(update: Update, first: float, second: float) -> Update:
    alignment = dict(zip(MATRICES, (first, second), strict=True))
    return Update(update.client, update.state, update.samples, alignment=alignment)


def merged(state: State, updates: Sequence[Update], **options: float) -> State:
    return PivotMerge(**options).aggregate(state, updates, {}).state  # type: ignore[arg-type]


def assert_same(a: State, b: State, tolerance: float = 1e-6) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def matrix(rows: list[list[float]]) -> State:
    return {"w": torch.tensor(rows, dtype=torch.float64)}


def of_matrices(*values: list[list[float]]) -> list[Update]:
    return [Update(f"c{k}", matrix(value), 1) for k, value in enumerate(values)]


class TestPivotMerge:
    def test_one_client_is_that_client(self) -> None:
        assert_same(merged(draw(0), clients(1)), clients(1)[0].state)

    def test_identical_clients_are_that_client(self) -> None:
        same = [aligned(Update(f"c{k}", draw(5), k + 1), 0.1 * k, 0.3) for k in range(4)]
        assert_same(merged(draw(0), same), draw(5))

    @settings(max_examples=20, deadline=None)
    @given(order=st.permutations(range(5)), seed=st.integers(0, 10**6))
    def test_order_changes_no_bit(self, order: list[int], seed: int) -> None:
        updates = [aligned(u, 0.1 * k, 0.5 - 0.1 * k) for k, u in enumerate(clients(5, seed))]
        one = PivotMerge().aggregate(draw(0), updates, {})
        other = PivotMerge().aggregate(draw(0), [updates[k] for k in order], {})
        assert all(torch.equal(one.state[name], other.state[name]) for name in SHAPES)
        assert one.figures == other.figures

    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        number=st.integers(2, 5),
        rank=st.integers(1, 4),
        energy=st.sampled_from([0.6, 1.0]),
    )
    def test_turns_with_the_embedding_space(self, seed: int, number: int, rank: int, energy: float) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q, _ = torch.linalg.qr(random(6, 6))
        deltas = [random(6, rank) @ random(rank, 4) for _ in range(number)]

        def step(turn: Tensor) -> Tensor:
            updates = [Update(f"c{k}", {"w": turn @ delta}, k + 1) for k, delta in enumerate(deltas)]
            return merged({"w": torch.zeros(6, 4, dtype=torch.float64)}, updates, energy=energy)["w"]

        torch.testing.assert_close(step(q), q @ step(torch.eye(6).double()), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("value", [-0.2, 0.0, 1e-6, 0.3])
    def test_equal_alignments_are_none(self, value: float) -> None:
        same = [aligned(update, value, value / 2) for update in clients(4)]
        assert_same(merged(draw(0), same), merged(draw(0), clients(4)))

    def test_opposite_clients_do_not_move(self) -> None:
        base, step = draw(0), draw(1)
        there = {name: base[name] + 1e-3 * step[name] for name in base}
        back = {name: base[name] - 1e-3 * step[name] for name in base}
        result = merged(base, [Update("a", there, 7), Update("b", back, 7)])
        assert_same(result, base, 1e-8)
        zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
        opposite = {name: -tensor for name, tensor in step.items()}
        result = merged(zero, [Update("a", step, 7), Update("b", opposite, 7)])
        assert all(bool((tensor == 0).all()) for tensor in result.values())

    def test_no_contribution_is_nearly_no_weight_in_that_layer(self) -> None:
        updates = [aligned(clients(2)[0], 0.0, 0.4), aligned(clients(2)[1], 0.5, 0.4)]
        weights = layer_weights("linear_1.weight", updates, 1e-3)
        assert weights["c0"] == pytest.approx(0.001 / (0.001 + 4 * 0.5))
        assert layer_weights("linear_2.weight", updates, 1e-3) == pytest.approx({"c0": 0.2, "c1": 0.8})
        result = merged(draw(0), updates)
        expected = 0.9995 * draw(2)["linear_1.bias"] + 0.0005 * draw(1)["linear_1.bias"]
        torch.testing.assert_close(result["linear_1.bias"], expected, rtol=0, atol=1e-4)

    def test_a_client_without_alignment_leaves_the_shares(self) -> None:
        some = [aligned(clients(3)[0], 0.9, 0.1), *clients(3)[1:]]
        assert_same(merged(draw(0), some), merged(draw(0), clients(3)))

    def test_nothing_moved_is_no_nan(self) -> None:
        for options in ({}, {"energy": 0.5}, {"specific": 0.0}):
            still = [Update(f"c{k}", draw(0), 1) for k in range(3)]
            assert_same(merged(draw(0), still, **options), draw(0))
        one = merged(draw(0), [Update("a", draw(0), 1), Update("b", draw(1), 1)])
        half = {name: (draw(0)[name] + draw(1)[name]) / 2 for name in SHAPES}
        assert_same(one, half)

    def test_splitting_a_client_changes_nothing(self) -> None:
        whole = [aligned(update, 0.1, 0.2 * k) for k, update in enumerate(clients(4))]
        last = whole[3]
        parts = [
            Update(name, last.state, samples, alignment=last.alignment)
            for name, samples in (("c3a", 4), ("c3b", 6))
        ]
        assert_same(merged(draw(0), whole), merged(draw(0), [*whole[:3], *parts]))

    def test_without_conflict_it_is_the_average(self) -> None:
        generator = torch.Generator().manual_seed(3)
        positive = torch.rand(6, 1, generator=generator)
        updates = [
            Update(f"c{k}", {"w": positive @ torch.rand(1, 4, generator=generator)}, k + 1) for k in range(4)
        ]
        zero = {"w": torch.zeros(6, 4)}
        assert_same(merged(zero, updates), FedAvg().aggregate(zero, updates, {}).state)

    def test_a_conflict_by_hand(self) -> None:
        """One canonical direction; the third client is against the others and drops out of it."""
        updates = of_matrices([[4.0, 1.0]], [[2.0, 0.0]], [[-3.0, 2.0]])
        zero = matrix([[0.0, 0.0]])
        consensus = torch.tensor([1.0, 1.0], dtype=torch.float64)
        spread = (17**0.5 + 2 + 13**0.5) / 3
        agreement = float(consensus.norm()) / spread
        kept = torch.tensor([3.0, 0.5], dtype=torch.float64)
        shared = kept.mean() * torch.ones(2, dtype=torch.float64)
        for exponent in (0.0, 1.0, 2.0):
            expected = shared + agreement**exponent * (kept - shared)
            result = merged(zero, updates, specific=exponent)["w"][0]
            torch.testing.assert_close(result, expected)

    def test_scale_multiplies_the_step(self) -> None:
        once, twice = merged(draw(0), clients(3)), merged(draw(0), clients(3), scale=2.0)
        assert_same(twice, {name: 2 * once[name] - draw(0)[name] for name in SHAPES}, 1e-5)


def test_cka_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    # Both are centred; XᵀX = 2 I, YᵀY = 2 and YᵀX = (2, 0), so A = 4 / (2√2 · 2).
    assert linear_cka(x, y) == pytest.approx(0.5**0.5)
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x[:, :1], x[:, 1:]) == pytest.approx(0)
    assert linear_cka(torch.full((4, 3), 0.1), y) == 0
    assert linear_cka(x[:1], y[:1]) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_cka_knows_neither_scale_nor_rotation_nor_shift(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    value = linear_cka(x, y)
    assert 0 <= value <= 1
    assert linear_cka(scale * x @ q + 3, y) == pytest.approx(value, rel=1e-6)
    assert linear_cka(y, x) == pytest.approx(value, rel=1e-9)


@pytest.fixture(scope="module")
def language(llama_dir: Path) -> FrozenLanguageModel:
    return FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def cache_path(extracted: Path) -> Path:
    return extracted.parent / "features/clinic.zarr"


@pytest.fixture(scope="module")
def batches(cache_path: Path, language: FrozenLanguageModel) -> list[Batch]:
    cache = {"clinic": FeatureCache(cache_path)}
    how = {"template": "plain", "max_length": 99, "batch_size": 8}
    return list(Stream(cache, language, **how, turns=1, seed=0).batches(0))  # type: ignore[arg-type]


def real(seed: int, architecture: str = "mlp2x_gelu", d_llm: int = D_LLM) -> tuple[torch.nn.Module, State]:
    module = projectors.build(Component(name=architecture), d_vision=D_VISION, d_llm=d_llm)
    projectors.initialise(module, torch.Generator().manual_seed(seed))
    return module, projectors.state_of(module)


def alignment(module: torch.nn.Module, state: State, language, batches: list[Batch]) -> float:  # type: ignore[no-untyped-def]
    """A(P), written the long way."""
    module.load_state_dict(state)
    x, y = [], []
    with torch.no_grad():
        for batch in batches:
            for features, labels in zip(batch.features, batch.labels, strict=True):
                x.append(module(features[None])[0].mean(0))
                y.append(language.embeddings(labels[labels != IGNORE_INDEX]).mean(0))
    x, y = torch.stack(x).double(), torch.stack(y).double()
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_contributions_are_what_is_lost_without_a_layer(language, batches: list[Batch]) -> None:  # type: ignore[no-untyped-def]
    assert sum(len(batch.ids) for batch in batches) == 20
    module, start = real(0)
    _, trained = real(1)
    found = alignment_contributions(VisionLanguage(module, language), start, trained, iter(batches), "cka")
    assert list(found) == list(MATRICES)
    whole = alignment(module, trained, language, batches)
    for layer in ("linear_1", "linear_2"):
        without = {
            name: start[name] if name.startswith(layer) else tensor for name, tensor in trained.items()
        }
        lost = whole - alignment(module, without, language, batches)
        assert found[f"{layer}.weight"] == pytest.approx(lost, abs=1e-5)
    assert 0 < whole < 1


def test_a_layer_contributes_what_the_loss_rises_without_its_training(language, batches: list[Batch]) -> None:  # type: ignore[no-untyped-def]
    """transformers' own loss of all texts, token by token."""
    module, start = real(0)
    _, trained = real(1)

    def loss(state: State) -> float:
        module.load_state_dict(state)
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                embeds = language.embed(batch.ids, module(batch.features))
                count = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
                total += count * float(language.model(inputs_embeds=embeds, labels=batch.labels).loss)
                tokens += count
        return total / tokens

    found = alignment_contributions(
        VisionLanguage(module, language), start, trained, iter(batches), "likelihood"
    )
    for layer in ("linear_1", "linear_2"):
        without = {name: start[name] if name.startswith(layer) else trained[name] for name in trained}
        assert found[f"{layer}.weight"] == pytest.approx(loss(without) - loss(trained), abs=1e-5)
        assert abs(found[f"{layer}.weight"]) > 1e-4


@pytest.mark.parametrize("measure", ["likelihood", "cka"])
def test_an_untrained_layer_contributes_nothing(language, batches: list[Batch], measure: Measure) -> None:  # type: ignore[no-untyped-def]
    module, start = real(0)
    before = projectors.state_of(module)
    half = real(1)[1] | {name: start[name] for name in ("linear_1.weight", "linear_1.bias")}
    found = alignment_contributions(VisionLanguage(module, language), start, half, batches, measure)
    assert found["linear_1.weight"] == 0
    assert found["linear_2.weight"] != 0
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert set(
        alignment_contributions(VisionLanguage(module, language), half, half, batches, measure).values()
    ) == {0.0}


def test_against_a_zero_base_every_layer_is_all_there_is(language, batches: list[Batch]) -> None:  # type: ignore[no-untyped-def]
    module, trained = real(1)
    zero = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    found = alignment_contributions(VisionLanguage(module, language), zero, trained, batches, "cka")
    whole = alignment(module, trained, language, batches)
    assert list(found.values()) == pytest.approx([whole, whole], abs=1e-5)


def write(path: Path, state: State, architecture: str = "mlp2x_gelu") -> Path:
    projectors.save_projector(path, state, architecture)
    return path


def merge(*words: object) -> Result:
    return CliRunner().invoke(main, ["merge", *map(str, words)])


def good(*words: object) -> str:
    result = merge(*words)
    assert result.exit_code == 0, result.output
    return result.output


def loaded(path: Path) -> State:
    return projectors.load_projector(path)[1]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A base and three projectors trained from it."""
    base = real(0)[1]
    write(tmp_path / "base.safetensors", base)
    paths = []
    for seed, name in enumerate(("berlin", "lyon", "turin"), 1):
        state = {key: base[key] + 0.1 * step for key, step in real(seed)[1].items()}
        paths.append(write(tmp_path / f"{name}.safetensors", state))
    return paths


@pytest.mark.parametrize("name", METHODS)
def test_every_strategy_merges_real_files(name: str, files: list[Path], tmp_path: Path) -> None:
    words = [*files, "--base", tmp_path / "base.safetensors", "--weights", "3,5,2", "--method", name]
    output = good(*words, "--out", tmp_path / "out.safetensors")
    assert "berlin" in output
    assert "merged" in output
    module, state = projectors.load_projector(tmp_path / "out.safetensors")
    assert module.architecture == "mlp2x_gelu"
    assert all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in state.values())
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["method"] == name
    assert manifest["projectors"] == {"out.safetensors": projectors.content_hash(state)}
    assert [entry["samples"] for entry in manifest["inputs"]] == [3, 5, 2]
    assert [entry["content"] for entry in manifest["inputs"]] == [
        projectors.content_hash(loaded(path)) for path in files
    ]
    assert manifest["base"]["content"] == projectors.content_hash(real(0)[1])
    turned = [*files[::-1], "--base", tmp_path / "base.safetensors", "--weights", "2,5,3", "--method", name]
    good(*turned, "--out", tmp_path / "again.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_every_strategy_merges_without_a_base(name: str, files: list[Path], tmp_path: Path) -> None:
    output = good(*files, "--method", name, "--out", tmp_path / "out")
    assert "Base: zero" in output
    assert "1 each, because" in output
    assert loaded(tmp_path / "out" / f"{name}.safetensors").keys() == real(0)[1].keys()


@pytest.mark.parametrize("name", ["fedavg", "local_only", "pivotmerge"])
def test_identical_projectors_give_that_projector(name: str, tmp_path: Path) -> None:
    state = real(3)[1]
    same = [write(tmp_path / f"{k}.safetensors", state) for k in range(3)]
    for base in ([], ["--base", write(tmp_path / "base.safetensors", real(0)[1])]):
        good(*same, *base, "--method", name, "--out", tmp_path / "out.safetensors")
        assert_same(dict(sorted(loaded(tmp_path / "out.safetensors").items())), dict(sorted(state.items())))


def test_the_table_and_the_average_by_hand(tmp_path: Path) -> None:
    def constant(value: float) -> State:
        return {name: torch.full_like(tensor, value) for name, tensor in real(0, "linear")[1].items()}

    a, b = (write(tmp_path / f"{n}.safetensors", constant(v), "linear") for n, v in (("a", 1), ("b", 3)))
    base = write(tmp_path / "base.safetensors", constant(2), "linear")
    output = good(
        a, b, "--base", base, "--weights", "1,3", "--method", "fedavg", "--out", tmp_path / "m.safetensors"
    )
    assert all(bool((tensor == 2.5).all()) for tensor in loaded(tmp_path / "m.safetensors").values())
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    norm = f"{(D_VISION * D_LLM + D_LLM) ** 0.5:.4g}"
    assert cells[0] == ["a", "1", norm, "-1.000"]
    assert cells[1] == ["b", "3", norm, "1.000"]
    assert cells[2][:2] == ["merged", "4"]


def test_several_methods_and_their_options(files: list[Path], tmp_path: Path) -> None:
    words = [*files, "--method", "fedavg", "--method", "pivotmerge", "--out", tmp_path / "merged"]
    good(*words, "--set", "pivotmerge.energy=0.5", "--set", "fedavg.server_learning_rate=0.5")
    names = ["fedavg.json", "fedavg.safetensors", "pivotmerge.json", "pivotmerge.safetensors"]
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == names
    options = json.loads((tmp_path / "merged/pivotmerge.json").read_text())["options"]
    assert options["energy"] == 0.5
    result = merge(*words, "--set", "enrgy=0.5", "--set", "fedavg.proximal=0")
    assert result.exit_code == 2
    assert "unknown key 'fedavg.enrgy'" in result.output


def a_run(folder: Path, state: State, samples: dict[str, int]) -> Path:
    write(folder / "projector.safetensors", state)
    rows: list[dict] = []
    for round_ in range(2):
        rows += [{"round": round_, "client": client, "samples": n} for client, n in samples.items()]
        rows.append({"round": round_, "client": None, "samples": sum(samples.values())})
    for client in samples:
        write(folder / f"silos/{client}.safetensors", state)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def samples_of(path: Path) -> dict[str, int]:
    return {entry["name"]: entry["samples"] for entry in json.loads(path.read_text())["inputs"]}


def test_runs_bring_their_samples(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", real(1)[1], {"clinic": 10, "lab": 6})
    two = a_run(tmp_path / "two", real(2)[1], {"depot": 5})
    out = ["--method", "fedavg", "--out", tmp_path / "m.safetensors"]
    assert "samples of the runs' histories" in good(one, two / "projector.safetensors", *out)
    assert samples_of(tmp_path / "m.json") == {"one": 32, "two": 10}
    good(one / "silos/clinic.safetensors", one / "silos/lab.safetensors", *out)
    assert samples_of(tmp_path / "m.json") == {"clinic": 20, "lab": 12}
    good(one / "silos/clinic.safetensors", two / "silos/depot.safetensors", one, *out, "--base", two)
    assert samples_of(tmp_path / "m.json") == {"clinic": 20, "depot": 10, "one": 32}
    loose = write(tmp_path / "loose.safetensors", real(3)[1])
    assert f"1 each, because {loose} has no history" in good(one, loose, *out)
    assert samples_of(tmp_path / "m.json") == {"one": 1, "loose": 1}
    for other in ("a", "b"):
        a_run(tmp_path / other / "same", real(4)[1], {"x": 1})
    good(tmp_path / "a/same", tmp_path / "b/same", *out)
    content = projectors.content_hash(real(4)[1])[:8]
    assert list(samples_of(tmp_path / "m.json")) == [f"same-{content}-0", f"same-{content}-1"]


@pytest.mark.parametrize("measure", ["likelihood", "cka"])
def test_alignments_weight_the_layers(
    files: list[Path], cache_path: Path, llama_dir: Path, tmp_path: Path, measure: str
) -> None:
    # Of random projectors layers contribute less than nothing, and the floor is for those alone.
    floor = ["--set", "floor=1e-9", "--set", f"pivotmerge.measure={measure}"]
    words = [*files, "--base", tmp_path / "base.safetensors", "--method", "pivotmerge", *floor]
    plain = good(*words, "--out", tmp_path / "plain.safetensors")
    assert "pivotmerge: without --features and --language" in plain
    guide = ["--features", cache_path, "--language", llama_dir, "--texts", "12"]
    for name in ("one", "two"):
        output = good(*words, *guide, "--out", tmp_path / f"{name}.safetensors")
    assert "Alignment: 12 training texts at most" in output
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert one != (tmp_path / "plain.safetensors").read_bytes()
    manifest = json.loads((tmp_path / "one.json").read_text())
    assert manifest["alignment"]["measure"] == measure
    contributions = manifest["alignment"]["contributions"]
    assert set(contributions) == {"berlin", "lyon", "turin"}
    assert all(set(layers) == set(MATRICES) for layers in contributions.values())
    updates = [Update(p.stem, loaded(p), 1, alignment=contributions[p.stem]) for p in files]
    by_hand = merged(real(0)[1], updates, floor=1e-9)
    for name, tensor in loaded(tmp_path / "one.safetensors").items():
        assert torch.equal(tensor, by_hand[name])
    each = ["--features", cache_path, "--features", cache_path.with_name("lab.zarr")]
    each += ["--features", cache_path, "--language", llama_dir]
    good(*words[:-4], "--method", "fedavg", *each, "--out", tmp_path / "both")
    assert json.loads((tmp_path / "both/fedavg.json").read_text())["alignment"] is None
    unused = good(*files, "--method", "fedavg", *guide, "--out", tmp_path / "unused.safetensors")
    assert "--features and --language are not used: fedavg" in unused


def test_mistakes_are_one_clear_line(
    files: list[Path], cache_path: Path, llama_dir: Path, tmp_path: Path
) -> None:
    a, b, c = files
    out = tmp_path / "m.safetensors"
    wide = write(tmp_path / "wide.safetensors", real(1, d_llm=40)[1])
    linear = write(tmp_path / "linear.safetensors", real(1, "linear")[1], "linear")
    nan = write(tmp_path / "nan.safetensors", real(1)[1] | {"linear_1.bias": torch.full((D_LLM,), torch.nan)})
    torn = write(tmp_path / "torn.safetensors", {"linear_1.weight": torch.zeros(2, 2)})
    empty = write(tmp_path / "empty.safetensors", {})
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"noise")
    wide_pair = [wide, write(tmp_path / "wide2.safetensors", real(2, d_llm=40)[1])]
    average = ["--method", "fedavg", "--out", out]
    guided = ["--method", "pivotmerge", "--out", out, "--language", llama_dir, "--features"]
    cases: list[tuple[list[object], str]] = [
        ([a, tmp_path / "none.safetensors", *average], "none.safetensors: no such projector"),
        ([a, tmp_path, *average], f"{tmp_path}/projector.safetensors: no such projector"),
        ([a, noise, *average], "noise.safetensors: not a safetensors file"),
        ([a, torn, *average], "torn.safetensors: its weights are not those of its architecture"),
        ([empty, a, *average], "empty.safetensors: its weights are not those of its architecture"),
        ([a, wide, *average], f"{wide}: linear_1.bias has shape (40,), but (32,) in {a}"),
        ([a, linear, *average], f"{linear}: architecture linear, but {a} is mlp2x_gelu"),
        ([a, b, "--base", wide, *average], f"{wide}: linear_1.bias has shape (40,)"),
        ([a, nan, *average], f"{nan}: cannot be merged: client 'nan' sent values that are not finite"),
        ([a, b, "--base", nan, *average], f"{nan}: cannot be the base: values that are not finite"),
        ([a, b, a, *average], f"{a}: is given twice"),
        (
            [a, b, "--method", "fedavgg", "--out", out],
            "no strategy is called 'fedavgg'; did you",
        ),
        ([a, b, "--method", "centralised", "--out", out], "--method centralised: trains one client on all"),
        ([a, b, *average, "--weights", "1,2,3"], "number of weights is 3, of projectors 2"),
        ([a, b, *average, "--weights", "1,0"], "--weights 1,0: expected whole numbers above 0"),
        ([a, b, *average, "--weights", "1,x"], "--weights 1,x: expected whole numbers above 0"),
        ([a, b, *average, "--set", "proximal"], "--set proximal: expected option=value"),
        ([a, b, *average, "--set", "ties.density=1"], "--set ties.density=1: expected option=value"),
        ([a, b, *average, "--set", "proximal=-1"], "fedavg.proximal = -1"),
        ([a, b, *average, "--set", "proximl=1"], "'fedavg.proximl'; did you mean 'proximal'?"),
        ([a, b, *average, "--method", "pivotmerge"], f"--out {out}: 2 methods write a file each"),
        ([a, b, "--method", "fedavg", "--out", a], f"--out {a}: is one of the projectors that are read"),
        ([a, b, "--base", c, "--method", "fedavg", "--out", c], f"--out {c}: is one of the projectors"),
        ([a, b, *average, "--language", llama_dir], "--features and --language are needed together"),
        ([a, b, c, *guided, cache_path, "--features", cache_path], "caches is 2, of projectors 3"),
        ([a, b, *guided, tmp_path / "no.zarr"], "no.zarr: this feature cache does not exist"),
        ([a, b, *guided, cache_path.with_name("heldout.zarr")], "heldout.zarr has no training text"),
        ([*wide_pair, *guided, cache_path], f"{llama_dir}: has width 32, but"),
        (
            [a, b, "--method", "pivotmerge", "--out", out, "--features", cache_path, "--language", tmp_path],
            f"{tmp_path}: no config.json with weights",
        ),
    ]
    for words, message in cases:
        result = merge(*words)
        assert result.exit_code == 2, (message, result.output)
        assert message in result.output
        assert not isinstance(result.exception, Exception)
        assert not out.exists()


def test_strategies_that_need_gradients_are_refused(files: list[Path], tmp_path: Path) -> None:
    for name in STRATEGIES.names():
        if "gradient" in STRATEGIES.build(Component(name=name), name).wants:
            result = merge(*files, "--method", name, "--out", tmp_path / "m.safetensors")
            assert result.exit_code == 2
            assert f"--method {name}: needs every client's gradient" in result.output


def test_a_merge_that_blows_up_writes_nothing(files: list[Path], tmp_path: Path) -> None:
    words = [*files, "--method", "fedavg", "--set", "server_learning_rate=1e300"]
    result = merge(*words, "--out", tmp_path / "m.safetensors")
    assert result.exit_code == 2
    assert "is not finite after merging" in result.output
    assert not (tmp_path / "m.safetensors").exists()


def test_a_damaged_manifest_never_vouches_for_new_bytes(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*files, "--method", "fedavg", "--out", tmp_path / "m.safetensors"]
    good(*words)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedcmp.pipeline.models.projector.save_projector", full)
    assert merge(*words, "--weights", "1,2,3").exit_code == 2
    assert not (tmp_path / "m.json").exists()


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fedcmp.cli import main\n"
        "assert CliRunner().invoke(main, ['merge', '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'zarr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
