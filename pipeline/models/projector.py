"""The cross-modal projector, the one part that is trained: made, initialised, saved, loaded, hashed.

Architectures are in `pipeline/projectors/`; the keys of linear and MLP projectors are those of
Hugging Face's LLaVA.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json, write_atomic
from fedcmp.pipeline.hashes import canonical
from fedcmp.pipeline.manifest import MANIFEST
from fedcmp.pipeline.models.projectors.base import PROJECTORS, Projector
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.plugins import Plugin
from fedcmp.pipeline.run_folder import local_part, own_projector, place_of

State = dict[str, Tensor]

_WHERE = "federate.projector"
_QUERY_STD = 0.02


def build(component: Component, *, d_vision: int, d_llm: int) -> Projector:
    """An uninitialised float32 projector.

    Raises:
        UserError: The architecture or an option is unknown, or an option does not fit the widths.
    """
    projector = PROJECTORS.build(component, _WHERE).module(d_vision, d_llm).float()
    projector.architecture = architecture_of(component)
    return projector


def architecture_of(component: Component) -> str:
    """How files name an architecture: its name alone, or JSON with the options that are not default.

    Raises:
        UserError: The architecture or an option is unknown.
    """
    options = PROJECTORS.build(component, _WHERE)
    defaults = {name: field.default for name, field in type(options).model_fields.items()}
    values = options.model_dump(mode="json")
    own = component.model_extra or {}
    changed = {name: values[name] for name in own if getattr(options, name) != defaults[name]}
    return canonical({"name": component.name, **changed}).decode() if changed else component.name


def component_of(architecture: str) -> Component:
    """The inverse of `architecture_of`.

    Raises:
        ValueError: It is not such a name.
    """
    if not architecture.startswith("{"):
        return Component(name=architecture)
    return Component.model_validate(json.loads(architecture))


def initialise(projector: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight from `generator`; what was there before does not matter.

    Linear layers are drawn as `nn.Linear` does, uniform in ±1/sqrt(fan_in), learned queries normal
    with the deviation 0.02 of BERT's embeddings; layer norms start as the identity.

    Raises:
        UserError: A plugin's projector has weights of another kind, which would not be those of the seed.
    """
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=_QUERY_STD, generator=generator)
        elif isinstance(layer, nn.LayerNorm):
            for weight, fill in ((layer.weight, nn.init.ones_), (layer.bias, nn.init.zeros_)):
                if weight is not None:
                    fill(weight)
        elif names := [name for name, _ in layer.named_parameters(recurse=False)]:
            raise UserError(
                f"{_WHERE}: {type(layer).__name__}.{names[0]} cannot be drawn from the seed; make projectors "
                "of nn.Linear, nn.Embedding and nn.LayerNorm"
            )


def state_of(projector: nn.Module) -> State:
    """A copy of the weights on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in projector.state_dict().items()}


def save_projector(path: Path, state: Mapping[str, Tensor], architecture: str) -> None:
    """Write weights as safetensors, atomically; `architecture` goes into the file's metadata.

    It is the only entry there, because safetensors writes several in random order.
    """
    write_atomic(path, save(dict(state), metadata={"architecture": architecture}))


def load_projector(path: Path, plugins: tuple[Plugin, ...] = ()) -> tuple[Projector, State]:
    """Read a projector written by `save_projector`; where a manifest speaks of it, it must be that one.

    Args:
        path: The file.
        plugins: Plugin files that may have its architecture; a projector's file never brings code.

    Raises:
        UserError: The file is missing, damaged, or not such a projector, or not the one of its run.
    """
    try:
        with safe_open(path, "pt") as file:
            architecture = (file.metadata() or {}).get("architecture", "")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such projector; run 'fedcmp federate' first") from None
    except Exception as error:
        raise UserError(f"{path}: not a safetensors file ({error}); train it again") from None
    try:
        component = component_of(architecture).with_plugins(plugins)
        options = PROJECTORS.build(component, _WHERE)
    except (ValueError, ValidationError):
        known = ", ".join(PROJECTORS.names())
        raise UserError(
            f"{path}: architecture '{architecture}' is none of {known}, nor of the plugins given"
        ) from None
    try:
        d_vision, d_llm = options.widths(state)
        projector = build(component, d_vision=d_vision, d_llm=d_llm)
        whole = projector.completed(state) | _own_part(path)
        projector.load_state_dict(whole)
    except UserError:
        raise
    except Exception:
        raise UserError(f"{path}: its weights are not those of its architecture; train it again") from None
    recorded, manifest = recorded_content(path)
    if recorded is not None and recorded != content_hash(state):
        raise UserError(
            f"{path}: holds {content_hash(state)[:12]}, but {manifest} says {recorded[:12]}; another file "
            "was put in its place: put the right one back, or run again what made it"
        )
    return projector, state


def _own_part(path: Path) -> State:
    """What the client of a projector keeps to itself, where its run says that it does.

    Raises:
        UserError: It is not here, or not what the run ended with.
    """
    folder, within = place_of(path)
    found = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    kept = found.get("local", {}).get(path.stem) if isinstance(found, dict) else None
    if kept is None or within != own_projector(path.stem):
        return {}
    own = local_part(folder, path.stem, kept["round"])
    if not own.is_file():
        raise UserError(
            f"{own}: missing; what client '{path.stem}' keeps to itself is where it trained: copy it here"
        )
    state = load_file(own)
    if kept["content"] not in (None, content_hash(state)):
        raise UserError(f"{own}: not what the run ended with; put that back, or train the run again")
    return state


def refuse_tuned(path: Path) -> None:
    """Refuse a projector that belongs to an LLM with an adapter, where that would be left behind.

    Raises:
        UserError: It is one.
    """
    folder, within = place_of(path)
    found = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    if isinstance(found, dict) and within in found.get("adapters", {}):
        raise UserError(
            f"{path}: its run tuned the LLM, too, and the projector alone is no model; give one of a run "
            "without federate.adapter"
        )


def recorded_content(path: Path) -> tuple[str | None, Path | None]:
    """The content hash that a manifest gives a projector, and that manifest: of its run, or of a merge."""
    folder, within = place_of(path)
    for manifest, name in (
        (folder / MANIFEST, within),
        (path.with_suffix(".json"), path.name),
    ):
        found = read_json(manifest) if manifest.is_file() else None
        recorded = found.get("projectors") if isinstance(found, dict) else None
        if isinstance(recorded, dict) and name in recorded:
            return str(recorded[name]), manifest
    return None, None


def content_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
