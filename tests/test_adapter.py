"""LoRA beside the frozen LLM: trained, aggregated, kept, judged and exported with the projector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import apart
from safetensors.torch import load_file
from test_export import features, pixels, reloaded, unpooled  # noqa: F401
from test_federate import _killed_after_saving, history
from test_sites import SILOS, FakeLink, over, sites_config  # noqa: F401

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.engines.service import Service
from fedcmp.federate.run import run as federate
from fedcmp.federate.server import rounds as server
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.config import Lora
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.export.subject import read_subject
from fedcmp.pipeline.models import lora
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import tokenise
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.records import Text, Turn
from fedcmp.pipeline.run_folder import Run

ADAPTER = "federate.adapter={rank = 2, alpha = 4, learning_rate = 2e-2}"


def call(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def done(config: Path, name: str, *overrides: str, command: str = "federate") -> Result:
    words = [word for each in (f"run={name}", *overrides) for word in ("--set", each)]
    return call(command, config, *words)


def run_of(config: Path, name: str) -> Run:
    run = Run.find(load(config).build / "runs/study" / name)
    assert run is not None
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.projector().state_dict() | run.adapter()


@pytest.fixture(scope="module")
def own(extracted: Path) -> Path:
    return apart(extracted, "lora")


@pytest.fixture(scope="module")
def over_sites(sites_config: Path) -> Path:  # noqa: F811
    return apart(sites_config, "lora-sites")


@pytest.fixture(scope="module")
def tuned(own: Path) -> Path:
    """The experiment file, a run with an adapter trained and judged."""
    for command in ("federate", "evaluate"):
        result = done(own, "tuned", ADAPTER, command=command)
        assert result.exit_code == 0, result.output
    return own


def test_a_fresh_adapter_changes_no_logit_and_freezes_the_llm(llama_dir: Path) -> None:
    plain, with_one = (
        FrozenLanguageModel(llama_dir, dtype="float32", device="cpu", adapter=options)
        for options in (None, Lora(rank=3))
    )
    shapes = {name: tuple(matrix.shape) for name, matrix in with_one.adapter.items()}
    state = lora.draw(shapes, torch.Generator().manual_seed(0))
    for name, matrix in with_one.adapter.items():
        matrix.data.copy_(state[name])
    embeds = torch.randn(2, 7, plain.d_llm)
    rows, places = torch.tensor([0, 1]), torch.tensor([6, 4])
    assert torch.equal(plain.logits(embeds, rows, places), with_one.logits(embeds, rows, places))
    # Seven linear layers in each of two blocks; the head has none.
    assert len(shapes) == 2 * 7 * 2
    assert shapes["lora.model.layers.0.mlp.down_proj.lora_A.weight"] == (3, 48)
    trainable = {id(parameter) for parameter in with_one.model.parameters() if parameter.requires_grad}
    assert trainable == {id(matrix) for matrix in with_one.adapter.values()}


def test_training_moves_both_and_leaves_the_llm_as_it_was(tuned: Path, llama_dir: Path) -> None:
    run = run_of(tuned, "tuned")
    assert run.adapters.keys() == run.projectors.keys()
    assert all(matrix.abs().max() > 0 for matrix in run.adapter().values())
    from fedcmp.pipeline.models.language import _loaded

    (model,) = (each.model for each in _loaded.values() if each.adapter)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    frozen = load_file(llama_dir / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in frozen.items())
    losses = {row["round"]: row["loss"] for row in history(tuned, "tuned") if row["client"] is None}
    assert losses[2] < losses[0]


def test_a_run_without_one_is_what_it_was(own: Path) -> None:
    assert done(own, "without").exit_code == 0
    manifest = run_of(own, "without").manifest
    assert "adapters" not in manifest
    assert "adapter" not in manifest["identity"]["federate"]
    assert not (run_of(own, "without").path / "adapter").exists()


def test_its_learning_rate_is_its_own(own: Path) -> None:
    frozen = "federate.adapter={rank = 2, learning_rate = 1e-12}"
    unclipped = ("federate.rounds=1", "federate.optimizer.max_grad_norm=1e9")
    assert done(own, "hardly", frozen, *unclipped).exit_code == 0
    assert done(own, "none", *unclipped).exit_code == 0
    hardly, none = run_of(own, "hardly"), run_of(own, "none")
    assert all(m.abs().max() < 1e-9 for name, m in hardly.adapter().items() if "lora_B" in name)
    for name, tensor in none.projector().state_dict().items():
        torch.testing.assert_close(hardly.projector().state_dict()[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in STRATEGIES.names() if name not in ("centralised", "local_only", "pilot")]
)
def test_every_strategy_aggregates_it(own: Path, name: str) -> None:
    result = done(
        own,
        f"by_{name}",
        ADAPTER,
        f"federate.strategy.name={name}",
        "federate.rounds=2",
        "federate.optimizer.learning_rate=1e-3",
    )
    assert result.exit_code == 0, result.output
    after = run_of(own, f"by_{name}").adapter()
    assert all(bool(torch.isfinite(matrix).all()) for matrix in after.values())
    assert any(matrix.abs().max() > 0 for layer, matrix in after.items() if "lora_B" in layer)


def test_silos_alone_keep_their_own(own: Path) -> None:
    result = done(own, "alone", ADAPTER, "federate.strategy.name=local_only", command="federate")
    assert result.exit_code == 0, result.output
    run = run_of(own, "alone")
    one, other = (run.adapter(f"silos/{silo}.safetensors") for silo in ("clinic", "lab"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert done(own, "alone", ADAPTER, "federate.strategy.name=local_only", command="evaluate").exit_code == 0


def test_killed_and_rerun_ends_in_the_same_bytes(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(server, "Progress", _killed_after_saving(server.Progress, Killed))
        with pytest.raises(Killed):
            federate(load(tuned, ["run=killed", ADAPTER]))
    assert "continuing after round" in done(tuned, "killed", ADAPTER).output
    assert run_of(tuned, "killed").adapters == run_of(tuned, "tuned").adapters


def test_equal_training_is_remembered(tuned: Path, tmp_path: Path) -> None:
    memo = f"memo.path={tmp_path}/memo"
    for name in ("first", "second"):
        assert done(tuned, name, ADAPTER, memo).exit_code == 0
    rows = [
        json.loads(line) for line in (run_of(tuned, "second").path / "history.jsonl").read_text().splitlines()
    ]
    assert all(row["recalled"] for row in rows if row["client"])
    assert run_of(tuned, "second").adapters == run_of(tuned, "tuned").adapters
    assert done(tuned, "other", ADAPTER.replace("2e-2", "1e-2"), memo).exit_code == 0
    assert run_of(tuned, "other").adapters != run_of(tuned, "tuned").adapters


def test_answers_are_those_of_both(tuned: Path, tmp_path: Path) -> None:
    run = run_of(tuned, "tuned")
    assert "nothing to do" in done(tuned, "tuned", ADAPTER).output
    assert (load(tuned).build / "scores/study/tuned/loss.json").is_file()
    other = {name: -matrix for name, matrix in run.adapter().items()}
    folder = run.path.with_name("swapped")
    shutil.copytree(run.path, folder)
    lora.save_adapter(folder / "adapter", other, Lora(rank=2, alpha=4), "x")
    refused = done(tuned, "swapped", ADAPTER, command="evaluate")
    assert refused.exit_code == 2
    assert "not the adapter that the run ended with" in refused.output
    assert not (load(tuned).build / "scores/study/swapped/loss.json").exists()
    again = done(tuned, "swapped", ADAPTER)
    assert "is missing or not the one of its manifest" in again.output
    assert run_of(tuned, "swapped").adapters == run.adapters
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"torn")
    assert "not an adapter" in done(tuned, "swapped", ADAPTER, command="evaluate").output


def test_sites_end_where_one_process_does(over_sites: Path) -> None:
    local = federate(load(over_sites, ["run=here", ADAPTER]))
    services: dict[int, Service] = {}
    for node, silo in enumerate(SILOS, 10):
        services[node] = Service(load(over_sites, ["run=there", ADAPTER]), silo)
    remote = federate(load(over_sites, ["run=there", ADAPTER]), over(FakeLink(services)))
    assert remote.adapters == local.adapters
    assert remote.projectors == local.projectors


@pytest.mark.parametrize(
    "options", [[], [ADAPTER.replace("rank = 2", "rank = 3")]], ids=["none", "other rank"]
)
def test_a_site_with_shapes_of_its_own_is_refused(over_sites: Path, options: list[str]) -> None:
    """Its terms may say what they like: the server takes memory for these shapes."""
    quick = ["sites.round_timeout=3", "sites.join_timeout=1"]
    services = {
        node: Service(load(over_sites, ["run=forged", *options, *quick]), silo)
        for node, silo in enumerate(SILOS, 10)
    }
    services[10]._site.adapter = {"lora.x.lora_A.weight": (32768, 32768)}
    with pytest.raises(UserError, match="site 'clinic' has an adapter of another form"):
        federate(load(over_sites, ["run=forged", *options, *quick]), over(FakeLink(services)))


@pytest.mark.parametrize(
    ("option", "far"),
    [
        ("federate.privacy={secure = true}", 1e-4),
        ("federate.communication.payload='bfloat16'", 0.05),
        ("federate.communication={payload = 'low_rank', rank = 1}", 0.6),
    ],
)
def test_it_travels_as_the_projector_does(over_sites: Path, option: str, far: float) -> None:
    runs = {}
    for name, options in (("clear", []), ("sent", [option])):
        assert done(over_sites, name, ADAPTER, *options).exit_code == 0
        runs[name] = run_of(over_sites, name).adapter()
    for name, matrix in runs["clear"].items():
        assert (runs["sent"][name] - matrix).norm() <= far * matrix.norm()
        assert not torch.equal(runs["sent"][name], matrix)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federate.together=2"], "every client has an LLM of its own"),
        (["federate.shard=true"], "federate.shard: spreads a frozen LLM alone"),
        (["federate.privacy={clip = 1.0, unit = 'text'}"], "federate.privacy.unit = 'text'"),
        (['federate.adapter.targets=["q_proj", "nothing"]'], None),
        (['federate.adapter.targets=["nothing"]'], "federate.adapter.targets"),
        (["federate.adapter.rank=0"], "federate.adapter.rank = 0"),
    ],
)
def test_what_cannot_be_is_refused(own: Path, overrides: list[str], message: str | None) -> None:
    result = done(own, "refused", "federate.rounds=1", ADAPTER, *overrides)
    assert result.exit_code == (0 if message is None else 2), result.output
    assert message is None or message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_without_peft_the_extra_is_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcmp.pipeline.models.language import _loaded

    _loaded.clear()
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    result = done(own, "refused", ADAPTER)
    assert result.exit_code == 2
    assert "fedcmp[instruct]" in result.output


def test_what_would_leave_it_behind_is_refused(tuned: Path, tmp_path: Path) -> None:
    assert done(tuned, "plain").exit_code == 0
    run, plain = run_of(tuned, "tuned").path, run_of(tuned, "plain").path
    for words in (
        ("federate", tuned, "--set", "run=next", "--set", f"federate.initial={run}"),
        ("merge", run, plain, "--method", "ties", "--out", tmp_path / "merged"),
    ):
        refused = call(*words)
        assert refused.exit_code == 2, refused.output
        assert "its run tuned the LLM, too" in " ".join(refused.output.split())


def logits(language: FrozenLanguageModel, projected: torch.Tensor) -> torch.Tensor:
    text = Text((Turn("user", "what color?"), Turn("assistant", "red")))
    sample = tokenise(text, "chat", language.tokenizer, patches=projected.shape[1], max_length=200)
    ids, _ = language.collate([sample])
    with torch.no_grad():
        embeds = language.embed(ids, projected[:1])
        return language.head(language.decoder(inputs_embeds=embeds).last_hidden_state)


def test_peft_loads_it(tuned: Path, llama_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = run_of(tuned, "tuned")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32), run.path / "adapter"
    ).eval()
    ours = FrozenLanguageModel(llama_dir, dtype="float32", device="cpu", adapter=Lora(rank=2, alpha=4))
    VisionLanguage(run.projector(), ours).load(weights(run))
    ids = torch.tensor([[5, 9, 11, 3, 7]])
    with torch.no_grad():
        expected = ours.head(ours.decoder(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        with theirs.disable_adapter():
            assert not torch.allclose(theirs(input_ids=ids).logits, expected, rtol=0, atol=1e-3)


def test_hugging_face_gets_the_tuned_llm(
    unpooled: Path,  # noqa: F811
    clip_dir: Path,
    llama_dir: Path,
    tmp_path: Path,
) -> None:
    result = done(unpooled, "tuned", ADAPTER)
    assert result.exit_code == 0, result.output
    path = unpooled.parent / "build/runs/whole/tuned"
    out = tmp_path / "hf"
    refused = call("export", path, "--to", "llava", "--out", tmp_path / "llava", "--config", unpooled)
    assert refused.exit_code == 2
    assert "use --to hf, which writes the tuned LLM" in " ".join(refused.output.split())
    assert call("export", path, "--to", "hf", "--out", out, "--config", unpooled).exit_code == 0
    given, run = read_subject(path, None), Run.find(path)
    assert run is not None
    ours = FrozenLanguageModel(llama_dir, dtype="float32", device="cpu", adapter=Lora(rank=2, alpha=4))
    VisionLanguage(run.projector(), ours).load(weights(run))
    model: Any = reloaded(out)
    with torch.no_grad():
        projected = given.projector(features(clip_dir, given))
        expected = logits(ours, projected)
        text = Text((Turn("user", "what color?"), Turn("assistant", "red")))
        sample = tokenise(text, "chat", ours.tokenizer, patches=given.patches, max_length=200)
        ids = torch.tensor([sample.ids])
        found = model(
            input_ids=ids.where(ids >= 0, model.config.image_token_index), pixel_values=pixels(clip_dir)[:1]
        ).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)
