"""LoRA (Hu et al., 2021, arXiv 2106.09685): low-rank matrices beside the LLM's linear layers, by peft.

Their names in a state start with `lora.`; files are in PEFT's layout, which `PeftModel` loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedcmp.pipeline.config import Lora
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import write_atomic

State = dict[str, Tensor]

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "lora."
_PEFT, _NAME = "base_model.model.", "default"


def inject(model: Any, options: Lora) -> dict[str, nn.Parameter]:
    """Put matrices beside a causal LM's linear layers, in place; everything else is frozen.

    Args:
        model: Of transformers.
        options: Which layers, and how.

    Returns:
        The float32 matrices A `(rank, d_in)` and B `(d_out, rank)` of every layer by name; B is zero.

    Raises:
        UserError: peft is missing, or the LLM has no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("federate.adapter: needs peft; run: pip install 'fedcmp[instruct]'") from None
    targets = options.targets if isinstance(options.targets, str) else list(options.targets)
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(f"federate.adapter.targets = {options.targets}: {one_line(error)}") from None
    matrices = {}
    for name, parameter in model.named_parameters():
        if name.endswith((f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight")):
            parameter.data = parameter.data.float()
            matrices[PREFIX + name.replace(f".{_NAME}.", ".")] = parameter
    return matrices


def draw(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> State:
    """Matrices to start from, in order of their names: A uniform as peft draws it, B zero."""
    state = {}
    for name in sorted(shapes):
        state[name] = torch.zeros(shapes[name])
        if name.endswith(".lora_A.weight"):
            nn.init.kaiming_uniform_(state[name], math.sqrt(5), generator=generator)
    return state


def divided(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """A state's projector, and its adapter."""
    adapter = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    return {name: tensor for name, tensor in state.items() if name not in adapter}, adapter


@torch.no_grad()
def merge(model: Any, options: Lora, state: Mapping[str, Tensor]) -> None:
    """Add an adapter to the weights of a causal LM that has none, in the dtype of these."""
    for layer in _layers(state):
        first, second = (state[f"{PREFIX}{layer}.lora_{part}.weight"] for part in "AB")
        weight = model.get_submodule(layer).weight
        weight.copy_(weight.float() + options.alpha / options.rank * (second @ first).to(weight.device))


def _layers(state: Mapping[str, Tensor]) -> list[str]:
    return sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in state})


def save_adapter(folder: Path, state: Mapping[str, Tensor], options: Lora, base: str) -> None:
    """Write an adapter as PEFT does.

    Args:
        folder: Where; the weights are written last.
        state: Matrices by name.
        options: Rank and scale.
        base: The LLM's path or name, for whoever loads it.
    """
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _layers(state),
        "inference_mode": True,
    }
    write_atomic(folder / SETTINGS, json.dumps(settings, indent=2).encode() + b"\n")
    named = {_PEFT + name.removeprefix(PREFIX): tensor.contiguous() for name, tensor in state.items()}
    write_atomic(folder / WEIGHTS, save(named, metadata={"format": "pt"}))


def load_adapter(folder: Path) -> State:
    """Read what `save_adapter` wrote; whoever knows what it should be compares it.

    Raises:
        UserError: It is missing or damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing; put the adapter back, or train the run again")
    try:
        return dict(_ours(load_file(path)))
    except Exception as error:
        raise UserError(f"{path}: not an adapter ({one_line(error)}); train the run again") from None


def _ours(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not name.startswith(_PEFT):
            raise ValueError(f"its '{name[:80]}' is none of PEFT's names")
        yield PREFIX + name.removeprefix(_PEFT), tensor
