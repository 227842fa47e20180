"""Every architecture: shapes, options, files; and weights from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.arithmetic.updates import Update
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.pretrained import llava_name, read_weights, start_from
from fedcmp.pipeline.models.projectors.base import PROJECTORS, Projector
from fedcmp.pipeline.options import Component

D_VISION, D_LLM, PATCHES = 6, 16, 36

KINDS = {
    "linear": ({}, PATCHES),
    "mlp1x_gelu": ({}, PATCHES),
    "mlp2x_gelu": ({}, PATCHES),
    "mlp11x_gelu": ({}, PATCHES),
    "pixel_shuffle_mlp": ({}, 9),
    "pixel_shuffle_mlp, 3": ({"scale": 3}, 4),
    "pilot": ({"tasks": ["a", "b"]}, PATCHES),
    "resampler": ({}, 64),
    "resampler, small": ({"queries": 5, "heads": 2, "expansion": 1}, 5),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def component(kind: str) -> Component:
    return Component(name=kind.split(",")[0], **KINDS[kind][0])


def made(kind: str, seed: int = 0, d_vision: int = D_VISION, d_llm: int = D_LLM) -> Projector:
    projector = projectors.build(component(kind), d_vision=d_vision, d_llm=d_llm)
    projectors.initialise(projector, torch.Generator().manual_seed(seed))
    return projector


def features(number: int = 2) -> torch.Tensor:
    return torch.randn(number, PATCHES, D_VISION, generator=torch.Generator().manual_seed(1))


def test_every_registered_projector_is_tried() -> None:
    assert PROJECTORS.names() == ["linear", "mlp{depth}x_gelu", "pilot", "pixel_shuffle_mlp", "resampler"]


@every_kind
def test_tokens_are_as_many_as_promised(kind: str) -> None:
    projector = made(kind)
    out = projector(features())
    assert projector.tokens(PATCHES) == KINDS[kind][1]
    assert out.shape == (2, KINDS[kind][1], D_LLM)
    assert out.dtype == torch.float32
    assert out.std() > 0


@every_kind
def test_every_weight_gets_a_gradient(kind: str) -> None:
    projector = made(kind)
    projector(features()).square().sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None
        # Adding one number to all keys changes no attention.
        assert bool(parameter.grad.any()) or name == "to_key.bias", name


@every_kind
def test_pictures_do_not_mix(kind: str) -> None:
    projector, pictures = made(kind), features(3)
    alone = torch.cat([projector(picture[None]) for picture in pictures])
    torch.testing.assert_close(projector(pictures), alone, rtol=1e-5, atol=1e-6)


@every_kind
def test_initialisation_depends_on_the_generator_alone(kind: str) -> None:
    first, other = projectors.state_of(made(kind)), projectors.state_of(made(kind, seed=1))
    torch.rand(7)
    assert projectors.content_hash(projectors.state_of(made(kind))) == projectors.content_hash(first)
    drawn = [name for name in first if "norm" not in name and name != "mask"]
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


@every_kind
def test_files_round_trip(kind: str, tmp_path: Path) -> None:
    projector, path = made(kind), tmp_path / "p.safetensors"
    projectors.save_projector(path, projectors.state_of(projector), projector.architecture)
    loaded, state = projectors.load_projector(path)
    assert projectors.content_hash(state) == projectors.content_hash(projectors.state_of(projector))
    assert loaded.architecture == projector.architecture
    assert (loaded.d_vision, loaded.d_llm) == (D_VISION, D_LLM)
    assert torch.equal(loaded(features()), projector(features()))
    assert read_weights(path)[0] == projector.architecture


def test_files_name_only_what_is_not_default(tmp_path: Path) -> None:
    """So files of linear and mlp2x_gelu are those of earlier versions."""
    assert made("mlp2x_gelu").architecture == "mlp2x_gelu"
    assert projectors.architecture_of(Component(name="resampler", queries=64)) == "resampler"  # type: ignore[call-arg]
    assert made("resampler, small").architecture == (
        '{"expansion":1,"heads":2,"name":"resampler","queries":5}'
    )
    old = {
        f"linear_{i}.{part}": torch.ones((3, 3) if part == "weight" else 3)
        for i in (1, 2)
        for part in ("weight", "bias")
    }
    save_file(old, tmp_path / "old.safetensors", metadata={"architecture": "mlp2x_gelu"})
    loaded, _ = projectors.load_projector(tmp_path / "old.safetensors")
    assert (loaded.d_vision, loaded.d_llm) == (3, 3)


def test_pixel_shuffle_joins_neighbours() -> None:
    projector = projectors.build(Component(name="pixel_shuffle_mlp"), d_vision=1, d_llm=4)
    taken = []
    projector.norm.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    projector(torch.arange(16.0).reshape(1, 16, 1))
    assert taken[0][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp0x_gelu", {}, "federate.projector.depth = '0'"),
        ("mlpx_gelu", {}, r"no projector is called 'mlpx_gelu'; did you mean 'mlp\{depth\}x_gelu'"),
        ("mlp2x_gelu", {"depth": 3}, "federate.projector.depth: the name 'mlp2x_gelu' sets it"),
        ("linear", {"scale": 2}, "unknown key 'federate.projector.scale'"),
        ("pixel_shuffle_mlp", {"scale": 0}, "federate.projector.scale = 0"),
        ("resampler", {"heads": 3}, "federate.projector.heads = 3: does not divide the LLM's width 16"),
        ("resampler", {"querys": 3}, "'federate.projector.querys'; did you mean 'queries'"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        projectors.build(Component(name=name, **options), d_vision=D_VISION, d_llm=D_LLM)


@pytest.mark.parametrize("patches", [37, 25])
def test_patches_that_form_no_grid_are_refused(patches: int) -> None:
    with pytest.raises(UserError, match=f"scale = 2: {patches} cached patches do not form a square grid"):
        made("pixel_shuffle_mlp").tokens(patches)


@pytest.mark.parametrize("strategy", ["fedavg", "fedcmp", "pivotmerge", "knots", "muon", "ties"])
@pytest.mark.parametrize("kind", ["resampler, small", "pixel_shuffle_mlp", "mlp11x_gelu"])
def test_strategies_take_every_architecture(strategy: str, kind: str) -> None:
    rule = STRATEGIES.build(Component(name=strategy), "federate.strategy")
    start = projectors.state_of(made(kind))
    updates = [Update(str(seed), projectors.state_of(made(kind, seed)), 2 + seed) for seed in (1, 2, 3)]
    memory = rule.begin(start, {update.client: update.samples for update in updates})
    fused = rule.aggregate(start, updates, memory).state
    made(kind).load_state_dict(fused)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fused.values())


def write_bin(path: Path, projector: Projector, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + llava_name(name): tensor for name, tensor in projectors.state_of(projector).items()}
    torch.save(tensors | {"model.embed_tokens.weight": torch.zeros(2)}, path)
    return path


def equal(state: projectors.State, projector: Projector) -> bool:
    return projectors.content_hash(state) == projectors.content_hash(projectors.state_of(projector))


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp11x_gelu"])
def test_llavas_file_is_taken(kind: str, tmp_path: Path) -> None:
    projector = made(kind, seed=5)
    path = write_bin(tmp_path / "adapter/mm_projector.bin", projector, "base_model.model.")
    for place in (path, path.parent):
        target = made(kind)
        start_from(place, target)
        assert equal(projectors.state_of(target), projector)


def test_llavas_names_are_those_of_its_sequence() -> None:
    assert llava_name("linear.bias") == "model.mm_projector.bias"
    assert llava_name("linear_1.weight") == "model.mm_projector.0.weight"
    assert llava_name("linear_2.bias") == "model.mm_projector.2.bias"


@pytest.mark.parametrize("prefix", ["multi_modal_projector.", "model.multi_modal_projector."])
def test_shards_of_hugging_face_are_taken(prefix: str, tmp_path: Path) -> None:
    projector = made("mlp2x_gelu", seed=5)
    half = {name: tensor.half() for name, tensor in projectors.state_of(projector).items()}
    for number in (1, 2):
        shard = {prefix + name: half[name] for name in half if name.startswith(f"linear_{number}")}
        save_file(shard | {f"lm_head.{number}": torch.zeros(1)}, tmp_path / f"model-{number}.safetensors")
    _, state = read_weights(tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], half[name].float()) for name in half)
    (tmp_path / "config.json").write_text(json.dumps({"projector_hidden_act": "relu"}))
    with pytest.raises(UserError, match="projector_hidden_act = 'relu'"):
        read_weights(tmp_path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "mm_projector.bin", made("mlp2x_gelu"))
    with pytest.raises(UserError, match=r"linear_1.bias has shape \(16,\), but .* has shape \(8,\); give"):
        start_from(path, made("mlp2x_gelu", d_llm=8))
    with pytest.raises(UserError, match=r"linear.bias is missing, but a projector linear from width 6 to 16"):
        start_from(path, made("linear"))
    ours = tmp_path / "ours.safetensors"
    projectors.save_projector(ours, projectors.state_of(made("resampler")), "resampler")
    with pytest.raises(UserError, match=r"architecture resampler, but federate.projector is .*heads"):
        start_from(ours, projectors.build(Component(name="resampler", heads=2), d_vision=6, d_llm=16))  # type: ignore[call-arg]
    bad = made("mlp2x_gelu")
    bad.linear_1.weight.data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"linear_1.weight is not finite"):
        start_from(write_bin(tmp_path / "inf.bin", bad), made("mlp2x_gelu"))


def test_what_holds_no_projector_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.bin")
    (tmp_path / "bad.safetensors").write_bytes(b"garbage")
    (tmp_path / "bad.bin").write_bytes(b"garbage")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "no such file"),
        ("x.bin", "no tensor named"),
        ("bad.safetensors", "not a safetensors file"),
        ("bad.bin", "cannot be read"),
        ("empty", "neither projector.safetensors"),
    ):
        with pytest.raises(UserError, match=rf"federate.initial = .*{name}: {message}"):
            read_weights(tmp_path / name)


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def test_pickled_code_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model.mm_projector.weight": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "evil.bin")
    assert "code ran" not in capsys.readouterr().out


def run(command: str, config: Path, *overrides: str) -> Result:
    words = [word for override in overrides for word in ("--set", override)]
    return CliRunner().invoke(main, [command, str(config), *words])


@pytest.mark.parametrize(
    "options",
    [
        ("federate.projector.name=pixel_shuffle_mlp",),
        ("federate.projector.name=resampler", "federate.projector.queries=3"),
        ("federate.projector.name=mlp3x_gelu",),
    ],
    ids=lambda options: options[0].split("=")[1],
)
def test_every_architecture_trains_and_answers(extracted: Path, options: tuple[str, ...]) -> None:
    overrides = (
        f"run={options[0].split('=')[1]}",
        "federate.rounds=2",
        "federate.strategy.name=fedcmp",
        *options,
    )
    for command in ("federate", "evaluate"):
        result = run(command, extracted, *overrides)
        assert result.exit_code == 0, result.output
    assert "pope: accuracy" in result.output


def test_merging_uses_the_projectors_own_number_of_tokens(extracted: Path, llama_dir: Path) -> None:
    options = ("federate.projector.name=pixel_shuffle_mlp", "federate.strategy.name=local_only")
    assert run("federate", extracted, "run=apart", "federate.rounds=1", *options).exit_code == 0
    root = extracted.parent
    silos = [str(root / f"build/runs/study/apart/silos/{name}.safetensors") for name in ("clinic", "lab")]
    words = ["merge", *silos, "--method", "pivotmerge", "--out", str(root / "merged.safetensors")]
    words += ["--features", str(root / "features/clinic.zarr"), "--language", str(llama_dir)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    loaded, _ = projectors.load_projector(root / "merged.safetensors")
    assert loaded.architecture == "pixel_shuffle_mlp"


def test_training_starts_from_given_weights(extracted: Path, tmp_path: Path) -> None:
    projector = made("mlp2x_gelu", seed=5, d_vision=24, d_llm=32)
    path = write_bin(tmp_path / "mm_projector.bin", projector)
    result = run("federate", extracted, "run=given", "federate.rounds=0", f"federate.initial={path}")
    assert result.exit_code == 0, result.output
    out = extracted.parent / "build/runs/study/given"
    _, state = projectors.load_projector(out / "projector.safetensors")
    assert equal(state, projector)
    moved = path.rename(tmp_path / "elsewhere.bin")
    again = run("federate", extracted, "run=given", "federate.rounds=0", f"federate.initial={moved}")
    assert "nothing to do" in again.output
    assert (
        "nothing to do"
        in run("federate", extracted, "run=given", "federate.rounds=0", f"federate.initial={out}").output
    )
    other = write_bin(tmp_path / "other.bin", made("mlp2x_gelu", seed=6, d_vision=24, d_llm=32))
    changed = run("federate", extracted, "run=given", "federate.rounds=0", f"federate.initial={other}")
    assert "training again, because federate.initial" in changed.output
    wrong = write_bin(tmp_path / "wrong.bin", made("mlp2x_gelu"))
    refused = run("federate", extracted, "run=refused", f"federate.initial={wrong}")
    assert refused.exit_code == 2
    assert "has shape (16,)" in refused.output


def test_without_initial_weights_the_identity_is_as_before(extracted: Path) -> None:
    assert "initial" not in run_identity(load(extracted))["federate"]
    assert not differences({"a": None}, {})
