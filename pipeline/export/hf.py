"""A directory that transformers' `LlavaForConditionalGeneration` loads, in versions 4.57 and 5.

Configurations are copied from the parts' own files, and tensors get the names of version 4: version 5
reads both, version 4 would silently start from random weights and default rotary frequencies.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.export.hf_processor import (
    IMAGE_TOKEN,
    compare_prompts,
    llava_tokenizer,
    quiet,
    write_processor,
    write_tokenizer,
)
from fedcmp.pipeline.export.rope import with_older_rope
from fedcmp.pipeline.export.subject import Subject
from fedcmp.pipeline.files import read_json, write_json
from fedcmp.pipeline.models.lora import merge
from fedcmp.pipeline.models.projector import State
from fedcmp.pipeline.models.projectors.linear import LinearProjector
from fedcmp.pipeline.models.projectors.mlp import MlpProjector
from fedcmp.pipeline.models.saved_model import why_unloadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANGUAGES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
TOWERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
_SHARD = "5GB"
_DISK_NAMES = {
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def write(out: Path, subject: Subject, encoder: Path, language: Path, template: str | None) -> None:
    """Write configuration, weights, processor and tokenizer.

    Args:
        out: An empty directory.
        subject: The projector.
        encoder: Directory of the vision encoder.
        language: Directory of the LLM.
        template: How questions are asked: `v1`, or else the tokenizer's own template where it has one.

    Raises:
        UserError: Hugging Face's LLaVA cannot express the parts.
    """
    activation, projector = _projector(subject)
    vision = _vision_config(subject, encoder)
    text = _text_config(language)
    with quiet():
        tower, llm = _tower(encoder), _language(language)
        if subject.adapter is not None:
            merge(llm, *subject.adapter)
        tokenizer = llava_tokenizer(language)
    image = int(cast("int", tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))
    tied = bool(llm.config.tie_word_embeddings)
    parts = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    parts |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    parts |= {
        f"model.language_model.{name}": tensor for name, tensor in llm.get_decoder().state_dict().items()
    }
    words = "model.language_model.embed_tokens.weight"
    parts[words] = _with_row(parts[words], image)
    parts["lm_head.weight"] = (
        parts[words] if tied else _with_row(llm.get_output_embeddings().weight.detach(), image)
    )
    strategy, extra = _selection(subject, vision)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "image_seq_length": subject.patches,
        "projector_hidden_act": activation,
        "multimodal_projector_bias": True,
        "vision_feature_layer": subject.layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": tied,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "text_config": text | {"vocab_size": len(parts[words]), "tie_word_embeddings": tied},
        "vision_config": vision,
    }
    write_json(out / "config.json", config)
    _write_weights(out, _assembled(out, parts), tied=tied)
    _write_generation(out, language, text, tokenizer)
    processor = {
        "patch_size": vision["patch_size"],
        "num_additional_image_tokens": extra,
        "vision_feature_select_strategy": strategy,
    }
    write_processor(out, encoder, vision["image_size"], subject.resize, processor)
    how = "chat" if tokenizer.chat_template and template != "v1" else "v1"
    write_tokenizer(out, tokenizer, how)
    compare_prompts(out, language, how, image)


def _projector(subject: Subject) -> tuple[str, State]:
    """The activation and weights of Hugging Face's two layers that compute the projector."""
    projector, state = subject.projector, subject.state
    if isinstance(projector, MlpProjector) and projector.depth == 2:
        return "gelu", state
    if isinstance(projector, LinearProjector):
        second = {
            "linear_2.weight": torch.eye(projector.d_llm),
            "linear_2.bias": torch.zeros(projector.d_llm),
        }
        return "linear", {name.replace("linear.", "linear_1."): state[name] for name in state} | second
    raise UserError(
        f"{subject.path}: Hugging Face's LLaVA has no form for a projector {projector.architecture}, only "
        "for linear and mlp2x_gelu; train one of these, or use --to llava for deeper MLPs"
    )


def _vision_config(subject: Subject, encoder: Path) -> dict[str, Any]:
    """The tower's configuration, from that of a tower or of a whole CLIP or SigLIP."""
    raw: dict[str, Any] = read_json(encoder / "config.json")
    family = raw.get("model_type")
    if family not in TOWERS:
        raise UserError(
            f"--encoder {encoder}: a model of type '{family}'; can be exported: {', '.join(TOWERS)}"
        )
    kind = "siglip_vision_model" if family.startswith("siglip") else "clip_vision_model"
    config = (raw["vision_config"] if "vision_config" in raw else raw) | {"model_type": kind}
    with quiet():
        from transformers import AutoConfig

        full = AutoConfig.for_model(**config)
    if full.hidden_size != subject.projector.d_vision:
        raise UserError(
            f"--encoder {encoder}: of width {full.hidden_size}, but {subject.path} takes "
            f"{subject.projector.d_vision}; give the encoder of its features"
        )
    patches = (full.image_size // full.patch_size) ** 2
    patches += kind == "clip_vision_model" and subject.tokens == "cls_patch"
    if patches != subject.patches:
        raise UserError(
            f"--encoder {encoder}: gives {patches} tokens a picture, but {subject.path} was trained on "
            f"{subject.patches}; give the encoder of its features"
        )
    defaults = {"patch_size": full.patch_size, "image_size": full.image_size, "hidden_size": full.hidden_size}
    return defaults | config


def _selection(subject: Subject, vision: dict[str, Any]) -> tuple[str, int]:
    """`vision_feature_select_strategy`, and the tower's tokens that are not patches."""
    if vision["model_type"] == "siglip_vision_model":
        # SigLIP has no CLS token: "default" would drop its first patch.
        return "full", 0
    return ("default" if subject.tokens == "patch" else "full"), 1


def _text_config(language: Path) -> dict[str, Any]:
    raw: dict[str, Any] = read_json(language / "config.json")
    family = raw.get("model_type")
    if family not in LANGUAGES:
        raise UserError(
            f"--language {language}: a model of type '{family}'; can be exported: {', '.join(LANGUAGES)}"
        )
    for obstacle in ("quantization_config", "final_logit_softcapping"):
        if raw.get(obstacle):
            raise UserError(
                f"--language {language}: its {obstacle} has no form in Hugging Face's LLaVA; use the model "
                "without it"
            )
    return with_older_rope(raw)


def _tower(encoder: Path) -> Any:
    from transformers import CLIPVisionModel, SiglipVisionModel

    family = str(read_json(encoder / "config.json")["model_type"])
    kind = SiglipVisionModel if family.startswith("siglip") else CLIPVisionModel
    return _loaded(kind, encoder, "--encoder")


def _language(language: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return _loaded(AutoModelForCausalLM, language, "--language")


def _loaded(kind: Any, path: Path, option: str) -> Any:
    """A model in the dtype it was saved in.

    Raises:
        UserError: It cannot be loaded, or not all of its weights are there.
    """
    try:
        model, report = kind.from_pretrained(
            path, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise UserError(f"{option} {path}: cannot be loaded: {why_unloadable(error)}") from None
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise UserError(f"{option} {path}: {missing} is missing from its weights; give the whole model")
    return model


def _with_row(table: Tensor, row: int) -> Tensor:
    """The table with a row for the image token, if it has none.

    New rows are the mean of all others: in the output layer it gives the mean logit, which is never
    the largest, so greedy answers stay what they were.
    """
    missing = row + 1 - len(table)
    if missing <= 0:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(missing, -1)])


def _assembled(out: Path, parts: State) -> State:
    """The parts as the state of a whole model, of which nothing is missing or superfluous."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    with quiet(), torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(AutoConfig.from_pretrained(out, trust_remote_code=False))
    model.load_state_dict(parts, strict=True, assign=True)
    state: State = model.state_dict()
    left = [name for name, tensor in state.items() if tensor.is_meta]
    assert not left, f"not assembled: {', '.join(left)}"
    return state


def _write_weights(out: Path, state: State, *, tied: bool) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    named = {_disk_name(name): tensor for name, tensor in state.items()}
    if tied:
        del named["language_model.lm_head.weight"]
    plan = split_torch_state_dict_into_shards(named, max_shard_size=_SHARD)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: named[name].detach().contiguous() for name in names}
        save_file(shard, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(out / "model.safetensors.index.json", index)


def _disk_name(name: str) -> str:
    for memory, disk in _DISK_NAMES.items():
        if name.startswith(memory):
            return disk + name.removeprefix(memory)
    raise AssertionError(name)


def _write_generation(
    out: Path, language: Path, text: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The LLM's own generation settings; what ends its answers here ends them there."""
    config = read_json(language / "generation_config.json")
    if config is None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = {name: text[name] for name in names if text.get(name) is not None}
    ends = config.get("eos_token_id")
    known = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    config["eos_token_id"] = sorted(known - {None})
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = tokenizer.pad_token_id
    write_json(out / "generation_config.json", config)
