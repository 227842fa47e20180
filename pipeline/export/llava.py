"""`mm_projector.bin` and `config.json` as the LLaVA repository (haotian-liu/LLaVA) reads them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.export.rope import with_older_rope
from fedcmp.pipeline.export.subject import Subject
from fedcmp.pipeline.files import read_json, write_atomic, write_json
from fedcmp.pipeline.models.pretrained import llava_name
from fedcmp.pipeline.models.projectors.linear import LinearProjector
from fedcmp.pipeline.models.projectors.mlp import MlpProjector

_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}

_ASPECT_RATIOS = {"crop": "square", "pad": "pad"}


def write(out: Path, subject: Subject, encoder: Path | None, tower: str, language: Path | None) -> None:
    """Write both files.

    Args:
        out: An empty directory.
        subject: The projector.
        encoder: The encoder's directory, if it is here.
        tower: The encoder's directory or name on the hub.
        language: The LLM's directory; without it the configuration holds LLaVA's own fields only.

    Raises:
        UserError: LLaVA has no such projector or encoder.
    """
    import torch

    if not isinstance(subject.projector, LinearProjector | MlpProjector):
        raise UserError(
            f"{subject.path}: the LLaVA repository knows no projector {subject.projector.architecture}, only "
            "linear and mlpNx_gelu; train one of these"
        )
    if subject.adapter is not None:
        raise UserError(
            f"{subject.path}: its run tuned the LLM, too, and this form holds a projector alone; use --to "
            "hf, which writes the tuned LLM"
        )
    if subject.resize not in _ASPECT_RATIOS:
        raise UserError(
            f"{subject.path}: its pictures were prepared with extract.encoder.resize = '{subject.resize}', "
            "which the LLaVA repository does not know; use --to hf"
        )
    config = _config(subject, str(encoder.resolve()) if encoder else tower)
    if encoder is not None:
        _refuse_other_towers(encoder)
    buffer = io.BytesIO()
    torch.save({llava_name(name): tensor for name, tensor in subject.state.items()}, buffer)
    write_atomic(out / "mm_projector.bin", buffer.getvalue())
    write_json(out / "config.json", _of_language(language) | config)


def _refuse_other_towers(encoder: Path) -> None:
    family = (read_json(encoder / "config.json") or {}).get("model_type")
    if family not in ("clip", "clip_vision_model"):
        raise UserError(
            f"--encoder {encoder}: a tower of type '{family}', and the LLaVA repository knows only CLIP; "
            "use --to hf"
        )


def _config(subject: Subject, tower: str) -> dict[str, Any]:
    """The fields that LLaVA adds to its LLM's configuration."""
    return {
        "mm_projector_type": subject.projector.architecture,
        "mm_hidden_size": subject.projector.d_vision,
        "hidden_size": subject.projector.d_llm,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": subject.layer,
        "mm_vision_select_feature": subject.tokens,
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": True,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "image_aspect_ratio": _ASPECT_RATIOS[subject.resize],
    }


def _of_language(path: Path | None) -> dict[str, Any]:
    """The LLM's own configuration under the name of LLaVA's class for it."""
    config: dict[str, Any] = {} if path is None else read_json(path / "config.json")
    family = config.get("model_type")
    if family not in _CLASSES:
        reason = "no LLM is given" if path is None else f"the LLaVA repository has no class for '{family}'"
        say(f"config.json holds LLaVA's own fields only, because {reason}")
        return {}
    name, architecture = _CLASSES[family]
    return with_older_rope(config) | {"model_type": name, "architectures": [architecture]}
