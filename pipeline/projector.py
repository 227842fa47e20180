"""The cross-modal projector: the one part that is trained. Keys are those of HF's LLaVA."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import gelu

from pipeline.config import Component
from pipeline.errors import UserError, did_you_mean
from pipeline.manifest import write_atomic

State = dict[str, Tensor]


class Linear(nn.Module):
    """One linear layer."""

    def __init__(self, d_vision: int, d_llm: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_vision, d_llm)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, patches, d_llm)`."""
        return self.linear(features)


class Mlp2xGelu(nn.Module):
    """LLaVA-1.5's two layers with GELU."""

    def __init__(self, d_vision: int, d_llm: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(d_vision, d_llm)
        self.linear_2 = nn.Linear(d_llm, d_llm)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, patches, d_llm)`."""
        return self.linear_2(gelu(self.linear_1(features)))


ARCHITECTURES: dict[str, type[nn.Module]] = {"linear": Linear, "mlp2x_gelu": Mlp2xGelu}


def build(component: Component, *, d_vision: int, d_llm: int) -> nn.Module:
    """An uninitialised float32 projector.

    Raises:
        UserError: The architecture is unknown.
    """
    if component.name not in ARCHITECTURES:
        hint = did_you_mean(component.name, ARCHITECTURES)
        raise UserError(f"federate.projector.name: no projector is called '{component.name}'{hint}")
    if component.model_extra:
        raise UserError(f"federate.projector: '{component.name}' takes no options")
    return ARCHITECTURES[component.name](d_vision, d_llm).float()


def initialise(projector: nn.Module, generator: torch.Generator) -> None:
    """Draw weights and biases as `nn.Linear` does, uniform in ±1/sqrt(fan_in), from `generator`."""
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def state_of(projector: nn.Module) -> State:
    """A copy of the weights on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in projector.state_dict().items()}


def save_projector(path: Path, state: Mapping[str, Tensor], architecture: str) -> None:
    """Write weights as safetensors, atomically; `architecture` goes into the file's metadata.

    It is the only entry there, because safetensors writes several in random order.
    """
    write_atomic(path, save(dict(state), metadata={"architecture": architecture}))


def load_projector(path: Path) -> tuple[nn.Module, State]:
    """Read a projector written by `save_projector`.

    Raises:
        UserError: The file is missing, damaged, or not such a projector.
    """
    try:
        with safe_open(path, "pt") as file:
            architecture = (file.metadata() or {}).get("architecture", "")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such projector; run 'fedcmp federate' first") from None
    except Exception as error:
        raise UserError(f"{path}: not a safetensors file ({error}); train it again") from None
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path}: architecture '{architecture}' is none of {', '.join(ARCHITECTURES)}")
    weights = [state[name] for name in sorted(state) if state[name].ndim == 2]
    projector = ARCHITECTURES[architecture](weights[0].shape[1], weights[-1].shape[0])
    projector.load_state_dict(state)
    return projector, state


def content_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
