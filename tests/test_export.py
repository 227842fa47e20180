"""Exported projectors compute elsewhere what they compute here, on tiny random models."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import picture
from PIL import Image
from safetensors import safe_open

from fedcmp.cli import main
from fedcmp.extract.encoders.transformers import Transformers
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.export import hf, llava
from fedcmp.pipeline.export.subject import Subject
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.pretrained import read_weights
from fedcmp.pipeline.models.prompts import question, tokenise
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.records import caption

PICTURES = [picture(seed) for seed in range(2)]
TEXTS = (caption("a small red circle"), caption("in the dark there is a zebra"))
WIDTH = 32


def llm(out: Path, family: str) -> Path:
    """A tiny random LLM of a family, with the world's tokenizer."""
    import transformers

    from fedcmp.pipeline.world import models

    tokenizer = models.tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    scaled = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 128, "rope_theta": 5e5}
    kind, options = {
        "llama": ("Llama", {"rope_parameters": scaled}),
        "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
        "qwen3": ("Qwen3", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        "mistral": ("Mistral", {"sliding_window": 16}),
        "gemma3_text": ("Gemma3Text", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    }[family]
    config = getattr(transformers, f"{kind}Config")(**common | options)
    model = getattr(transformers, f"{kind.replace('Gemma3Text', 'Gemma3')}ForCausalLM")(config)
    # Random tied embeddings answer with the last word again; larger ones tell words apart.
    model.get_input_embeddings().weight.data.normal_(0, 0.5)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(2)
    return {family: llm(tmp_path_factory.mktemp(family), family) for family in hf.LANGUAGES}


@pytest.fixture(scope="module")
def siglip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(3)
    out = tmp_path_factory.mktemp("siglip")
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(out)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(out)
    return out


def subject(
    name: str = "mlp2x_gelu", *, layer: int = -2, tokens: str = "patch", resize: str = "crop"
) -> Subject:
    projector = projectors.build(Component(name=name), d_vision=24, d_llm=WIDTH)
    projectors.initialise(projector, torch.Generator().manual_seed(4))
    key = {"encoder": {"name": "transformers", "layer": layer, "tokens": tokens, "resize": resize}}
    patches = 16 + (tokens == "cls_patch")
    return Subject(Path("p"), projector, projectors.state_of(projector), patches, key, None)


def pixels(encoder: Path) -> torch.Tensor:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(encoder, backend="pil")
    images = [Image.open(io.BytesIO(each)) for each in PICTURES]
    return processor(images, return_tensors="pt")["pixel_values"]


def features(encoder: Path, given: Subject) -> torch.Tensor:
    """What stage one caches."""
    options = Transformers(path=encoder, layer=given.layer, tokens=given.tokens)
    return options.load("cpu", "float32").encode(pixels(encoder))


def reloaded(out: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_equal(
    out: Path, given: Subject, encoder: Path, language_dir: Path, template: str = "chat"
) -> None:
    """Logits and greedy tokens of the exported model on pixels are those of the cached path."""
    model, language = reloaded(out), FrozenLanguageModel(language_dir, dtype="float32", device="cpu")
    image = model.config.image_token_index
    with torch.no_grad():
        projected = given.projector(features(encoder, given))
    patches = given.patches
    samples = [tokenise(t, template, language.tokenizer, patches=patches, max_length=200) for t in TEXTS]
    ids, _ = language.collate(samples)
    with torch.no_grad():
        ours = language.head(language.decoder(inputs_embeds=language.embed(ids, projected)).last_hidden_state)
        theirs = model(input_ids=ids.where(ids >= 0, image), pixel_values=pixels(encoder)).logits
    torch.testing.assert_close(theirs[..., : ours.shape[-1]], ours, rtol=0, atol=1e-5)

    # Questions of different lengths about two pictures, in one batch and one by one.
    owners, said = [1, 0, 1], []
    questions = ("what color?", "is there a small red circle at the top left?", "how many?")
    asked = [
        tokenise(question(q), template, language.tokenizer, patches=patches, max_length=200)
        for q in questions
    ]
    answers = language.generate(asked, projected, owners, max_new_tokens=10, stop=None)
    for each, owner in zip(asked, owners, strict=True):
        prompt = torch.tensor([each.ids])
        output = model.generate(
            input_ids=prompt.where(prompt >= 0, image),
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixels(encoder)[owner : owner + 1],
            max_new_tokens=10,
            do_sample=False,
        )
        said.append(language.tokenizer.decode(output[0, len(each.ids) :], skip_special_tokens=True).strip())
    assert said == answers
    assert any(answers)


def keys(out: Path) -> set[str]:
    found: set[str] = set()
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("family", hf.LANGUAGES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_whole_model_is_the_same(  # type: ignore[no-untyped-def]
    tower: str, family: str, clip_dir, siglip_dir, llms, tmp_path: Path, capsys
) -> None:
    encoder = clip_dir if tower == "clip" else siglip_dir
    given = subject()
    hf.write(tmp_path, given, encoder, llms[family], "chat")
    assert "Note" not in capsys.readouterr().out
    assert_equal(tmp_path, given, encoder, llms[family])
    names = keys(tmp_path)
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    tied = family in ("qwen2", "gemma3_text")
    assert ("language_model.lm_head.weight" in names) != tied
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_feature_select_strategy"] == ("default" if tower == "clip" else "full")
    assert config["text_config"]["rope_theta"] == {"llama": 5e5, "qwen3": 1e6, "gemma3_text": 1e6}.get(
        family, 1e4
    )


@pytest.mark.parametrize(("layer", "tokens"), [(-1, "patch"), (-3, "cls_patch")])
def test_layer_and_tokens_are_those_of_the_cache(  # type: ignore[no-untyped-def]
    layer: int, tokens: str, clip_dir, llms, tmp_path: Path
) -> None:
    given = subject(layer=layer, tokens=tokens)
    hf.write(tmp_path, given, clip_dir, llms["llama"], "chat")
    assert_equal(tmp_path, given, clip_dir, llms["llama"])


def test_a_linear_projector_becomes_two_layers(clip_dir: Path, llms: dict[str, Path], tmp_path: Path) -> None:
    given = subject("linear")
    hf.write(tmp_path, given, clip_dir, llms["qwen3"], "chat")
    assert_equal(tmp_path, given, clip_dir, llms["qwen3"])
    _, state = read_weights(tmp_path)
    assert projectors.content_hash(state) == projectors.content_hash(given.state)


def foreign_tokenizer(source: Path, out: Path) -> Path:
    """The same LLM with a tokenizer that has no image token, no padding and no chat template."""
    shutil.copytree(source, out)
    text = (out / "tokenizer.json").read_text().replace("<image>", "picture~")
    (out / "tokenizer.json").write_text(text)
    config = json.loads((out / "tokenizer_config.json").read_text())
    for name in ("extra_special_tokens", "additional_special_tokens", "pad_token", "chat_template"):
        config.pop(name, None)
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    (out / "chat_template.jinja").unlink(missing_ok=True)
    return out


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_llm_without_image_token_gets_one_with_a_row(  # type: ignore[no-untyped-def]
    family: str, clip_dir, llms, tmp_path: Path
) -> None:
    language, out, given = foreign_tokenizer(llms[family], tmp_path / "llm"), tmp_path / "out", subject()
    rows = json.loads((language / "config.json").read_text())["vocab_size"]
    out.mkdir()
    hf.write(out, given, clip_dir, language, None)
    config = json.loads((out / "config.json").read_text())
    assert config["image_token_index"] == rows
    assert config["text_config"]["vocab_size"] == rows + 1
    assert_equal(out, given, clip_dir, language, "v1")


@pytest.mark.parametrize("template", ["chat", "v1"])
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_processor_prepares_what_stage_one_and_evaluation_do(  # type: ignore[no-untyped-def]
    template: str, resize: str, tower: str, clip_dir, siglip_dir, llms, tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    encoder = clip_dir if tower == "clip" else siglip_dir
    hf.write(tmp_path, subject(resize=resize), encoder, llms["llama"], template)
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "what color?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(io.BytesIO(PICTURES[0]))
    batch = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
    language = FrozenLanguageModel(llms["llama"], dtype="float32", device="cpu")
    ours = tokenise(question("what color?"), template, language.tokenizer, patches=16, max_length=200)
    assert batch["input_ids"][0].tolist() == [4 if token < 0 else token for token in ours.ids]
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    cached = Transformers(path=encoder, resize=resize).load("cpu", "float32").preprocess(image)
    torch.testing.assert_close(batch["pixel_values"][0], torch.from_numpy(cached), rtol=0, atol=1e-6)
    plain = [{"role": "user", "content": "<image>\nwhat color?"}]
    assert processor.apply_chat_template(plain, add_generation_prompt=True) == prompt


@pytest.mark.parametrize(("resize", "ratio"), [("crop", "square"), ("pad", "pad"), ("squash", None)])
def test_llava_prepares_what_stage_one_did(resize: str, ratio: str | None, tmp_path: Path) -> None:
    given = subject(resize=resize)
    if ratio is None:
        with pytest.raises(UserError, match="resize = 'squash', which the LLaVA repository does not know"):
            llava.write(tmp_path, given, None, "openai/clip", None)
        return
    llava.write(tmp_path, given, None, "openai/clip", None)
    assert json.loads((tmp_path / "config.json").read_text())["image_aspect_ratio"] == ratio


def test_llava_knows_only_clip_and_mlps(siglip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="type 'siglip_vision_model', and the LLaVA repository knows only CLIP"
    ):
        llava.write(tmp_path, subject(), siglip_dir, "x", None)
    with pytest.raises(UserError, match="knows no projector resampler, only linear and mlpNx_gelu"):
        llava.write(tmp_path, subject("resampler"), None, "openai/clip", None)


@pytest.mark.parametrize("name", ["mlp1x_gelu", "mlp3x_gelu", "pixel_shuffle_mlp", "resampler"])
def test_what_hugging_face_cannot_express_is_refused(  # type: ignore[no-untyped-def]
    name: str, clip_dir, llms, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"no form for a projector {name}, only for linear and mlp2x_gelu"):
        hf.write(tmp_path, subject(name), clip_dir, llms["llama"], "chat")


def test_parts_of_other_kinds_are_refused(clip_dir: Path, llms: dict[str, Path], tmp_path: Path) -> None:
    def changed(source: Path, **options: Any) -> Path:
        out = tmp_path / "-".join(options)
        shutil.copytree(source, out)
        config = json.loads((out / "config.json").read_text()) | options
        (out / "config.json").write_text(json.dumps(config))
        return out

    llama = llms["llama"]
    for encoder, language, message in (
        (changed(clip_dir, model_type="dinov2"), llama, "a model of type 'dinov2'; can be exported: clip"),
        (changed(clip_dir, image_size=64), llama, "gives 64 tokens a picture, but p was trained on 16"),
        (changed(clip_dir, hidden_size=48), llama, "of width 48, but p takes 24"),
        (clip_dir, changed(llama, model_type="gpt2", x=1), "a model of type 'gpt2'; can be exported: llama"),
        (
            clip_dir,
            changed(llms["gemma3_text"], final_logit_softcapping=9.0),
            "final_logit_softcapping has no",
        ),
    ):
        with pytest.raises(UserError, match=message):
            hf.write(tmp_path, subject(), encoder, language, "chat")


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def unpooled(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file with features that LLaVA can compute, stages one and two done."""
    root = tmp_path_factory.mktemp("unpooled")
    path = root / "whole.toml"
    path.write_text(
        f"""
extends = "{workplace}/experiment.toml"
experiment = "whole"
features = "{root}/features"
build = "{root}/build"
[extract.encoder]
pool = 1
[federate]
rounds = 1
"""
    )
    for command in ("extract", "federate"):
        result = run(command, path)
        assert result.exit_code == 0, result.output
    return path


def run_of(config: Path) -> Path:
    return config.parent / "build/runs/whole/whole"


def test_the_road_to_hugging_face(unpooled: Path, clip_dir: Path, llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    words = ("export", run_of(unpooled), "--to", "hf", "--out", out, "--config", unpooled)
    result = run(*words)
    assert result.exit_code == 0, result.output
    projector, state = projectors.load_projector(run_of(unpooled) / "projector.safetensors")
    key = json.loads((run_of(unpooled) / "manifest.json").read_text())["features"]["key"]
    assert_equal(out, Subject(out, projector, state, 16, key, None), clip_dir, llama_dir)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["identity"]["projector"]["content"] == projectors.content_hash(state)
    assert set(manifest["files"]) == {path.name for path in out.iterdir()} - {"manifest.json"}
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    assert "nothing to do" in run(*words).output
    (out / "manifest.json").unlink()
    refused = run(*words)
    assert refused.exit_code == 2
    assert "holds something else" in refused.output
    start = run(
        "federate",
        unpooled,
        "--set",
        "run=again",
        "--set",
        f"federate.initial={out}",
        "--set",
        "federate.rounds=0",
    )
    assert start.exit_code == 0, start.output
    _, again = projectors.load_projector(run_of(unpooled).with_name("again") / "projector.safetensors")
    assert projectors.content_hash(again) == projectors.content_hash(state)


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_the_road_to_llava(
    unpooled: Path, clip_dir: Path, llama_dir: Path, tmp_path: Path, name: str
) -> None:
    words = ("--set", f"federate.projector.name={name}", "--set", f"run={name}")
    assert run("federate", unpooled, *words).exit_code == 0
    out, source = tmp_path / "llava", run_of(unpooled).with_name(name)
    result = run("export", source, "--to", "llava", "--out", out, "--config", unpooled)
    assert result.exit_code == 0, result.output
    _, state = projectors.load_projector(source / "projector.safetensors")
    assert projectors.content_hash(read_weights(out)[1]) == projectors.content_hash(state)
    saved = torch.load(out / "mm_projector.bin", weights_only=True)
    first = "model.mm_projector.weight" if name == "linear" else "model.mm_projector.0.weight"
    assert saved[first].shape == (32, 24)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["num_hidden_layers"] == 2
    expected = {
        "mm_projector_type": name,
        "mm_hidden_size": 24,
        "hidden_size": 32,
        "mm_vision_tower": str(clip_dir.resolve()),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "square",
        "use_mm_proj": True,
    }
    assert {field: config[field] for field in expected} == expected
    assert json.loads((out / "manifest.json").read_text())["identity"]["to"] == "llava"


def test_llava_takes_a_tower_by_name(unpooled: Path, tmp_path: Path) -> None:
    name = "openai/clip-vit-large-patch14-336"
    result = run("export", run_of(unpooled), "--to", "llava", "--out", tmp_path / "x", "--encoder", name)
    assert result.exit_code == 0, result.output
    assert "taken for a name on the hub" in result.output
    assert "LLaVA's own fields only, because no LLM is given" in result.output
    assert json.loads((tmp_path / "x/config.json").read_text())["mm_vision_tower"] == name


def test_a_projector_file_alone_needs_its_experiment(unpooled: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone.safetensors"
    shutil.copy(run_of(unpooled) / "projector.safetensors", lone)
    result = run("export", lone, "--to", "llava", "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert "which features it projects; give the experiment file with --config" in result.output
    words = ("export", lone, "--to", "hf", "--out", tmp_path / "x", "--config", unpooled)
    assert "federate.silos" in run(*words, "--set", "federate.silos=[]").output
    result = run(*words, "--set", "language.question_template=v1")
    assert result.exit_code == 0, result.output


def test_what_does_not_belong_together_is_refused(  # type: ignore[no-untyped-def]
    extracted: Path, unpooled: Path, clip_dir, llama_dir, siglip_dir, llms, tmp_path: Path
) -> None:
    pooled = run("federate", extracted, "--set", "run=pooled", "--set", "federate.rounds=0")
    assert pooled.exit_code == 0
    whole, pooled = run_of(unpooled), extracted.parent / "build/runs/study/pooled"
    (tmp_path / "file").write_text("")
    both = ("--encoder", clip_dir, "--language", llama_dir)
    for words, message in (
        ((pooled, *both), "extract.encoder.pool = 2), which LLaVA has no form for"),
        ((whole,), "--encoder is missing"),
        ((whole, "--set", "seed=1"), "overrides an experiment file; give one with --config"),
        ((whole, "--encoder", clip_dir), "--language is missing"),
        ((whole, "--encoder", siglip_dir, "--language", llama_dir), "not what the features were made with"),
        ((whole, "--encoder", clip_dir, "--language", llms["qwen2"]), "was trained with"),
        ((whole, "--encoder", tmp_path / "none", "--language", llama_dir), "no config.json with weights"),
        ((tmp_path, *both), "no such projector"),
        ((whole, *both, "--out", tmp_path / "file"), "is a file; give a directory"),
        ((whole, *both, "--out", tmp_path), "holds something else"),
    ):
        result = run("export", "--to", "hf", "--out", tmp_path / "out", *words)
        assert result.exit_code == 2, (words, result.output)
        assert message in result.output
        assert not (tmp_path / "out").exists()


def test_shards_are_whole(clip_dir: Path, llms: dict[str, Path], tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(hf, "_SHARD", "40KB")
    given = subject()
    hf.write(tmp_path, given, clip_dir, llms["qwen3"], "chat")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == keys(tmp_path)
    assert_equal(tmp_path, given, clip_dir, llms["qwen3"])
    _, state = read_weights(tmp_path)
    assert projectors.content_hash(state) == projectors.content_hash(given.state)
