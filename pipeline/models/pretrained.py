"""Projector weights from elsewhere: LLaVA's `mm_projector.bin`, Hugging Face's LLaVA, or ours.

LLaVA numbers the modules of a sequence (`model.mm_projector.{0,2,..}.weight`, the GELUs have none),
Hugging Face the linear layers (`multi_modal_projector.linear_{1,2}.weight`), and so do we.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.models.projector import (
    State,
    build,
    component_of,
    content_hash,
    load_projector,
    refuse_tuned,
)
from fedcmp.pipeline.models.projectors.base import Projector
from fedcmp.pipeline.models.saved_model import weight_files
from fedcmp.pipeline.plugins import Plugin

_HUGGING_FACE = re.compile(r"(?:^|\.)multi_modal_projector\.(linear_[12]\.(?:weight|bias))$")
_LLAVA = re.compile(r"(?:^|\.)mm_projector\.(?:(\d+)\.)?(weight|bias)$")


def start_from(path: Path, projector: Projector, plugins: tuple[Plugin, ...] = ()) -> str:
    """Load weights from elsewhere into a projector; `plugins` may have its architecture.

    Returns:
        Their content hash.

    Raises:
        UserError: There are none, or they are of another architecture, encoder or LLM.
    """
    architecture, state = read_weights(path, plugins)
    given, target = content_hash(state), projector
    if projector.grows_from is not None and architecture in (None, projector.grows_from):
        target = build(component_of(projector.grows_from), d_vision=projector.d_vision, d_llm=projector.d_llm)
    where = f"federate.initial = {path}"
    if architecture not in (None, target.architecture):
        raise UserError(
            f"{where}: architecture {architecture}, but federate.projector is {projector.architecture}; "
            "make them equal"
        )
    wanted = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{where}: {name} {_in_words(found.get(name))}, but a projector {projector.architecture} "
                f"from width {projector.d_vision} to {projector.d_llm} {_in_words(wanted.get(name))}; give "
                "weights of this architecture, encoder and LLM"
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise UserError(f"{where}: {name} is not finite; give other weights")
    if target is projector:
        projector.load_state_dict(state)
    else:
        projector.begin(state)
    return given


def read_weights(path: Path, plugins: tuple[Plugin, ...] = ()) -> tuple[str | None, State]:
    """Float32 weights under our names, and their architecture where the file says it.

    Args:
        path: A LLaVA `mm_projector.bin` or the directory that holds it, a directory or safetensors
            file of Hugging Face's LLaVA, or a run's directory or projector of ours.
        plugins: Plugin files that may have the architecture of ours.

    Raises:
        UserError: There is no such file, or it holds no projector.
    """
    if path.is_dir():
        return _from_directory(path, plugins)
    if not path.is_file():
        raise UserError(f"federate.initial = {path}: no such file; give a projector's weights")
    if path.suffix == ".safetensors" and _is_ours(path):
        refuse_tuned(path)
        projector, state = load_projector(path, plugins)
        return projector.architecture, {name: tensor.float() for name, tensor in state.items()}
    return None, _mapped(path, _tensors([path]))


def _from_directory(path: Path, plugins: tuple[Plugin, ...]) -> tuple[str | None, State]:
    if (path / "projector.safetensors").is_file():
        return read_weights(path / "projector.safetensors", plugins)
    loaded: list[str] = []
    with suppress(UserError):  # of a projector alone, transformers loads nothing
        loaded = [name for name in weight_files(path) if name.endswith(".safetensors")]
    files = [path / name for name in loaded]
    files = files or sorted(path.glob("mm_projector.bin")) or sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"federate.initial = {path}: neither projector.safetensors, mm_projector.bin nor shards of a "
            "model in safetensors; give a projector's weights"
        )
    state = _mapped(path, _tensors(files))
    return None, _with_activation(path, state, read_json(path / "config.json") or {})


def _with_activation(path: Path, state: State, config: Mapping[str, object]) -> State:
    """Weights as they work with the activation that a Hugging Face configuration names."""
    activation = config.get("projector_hidden_act", "gelu")
    if activation == "linear" and _is_identity(state):
        return {f"linear.{part}": state[f"linear_1.{part}"] for part in ("weight", "bias")}
    if activation != "gelu":
        raise UserError(
            f"federate.initial = {path}: projector_hidden_act = '{activation}' in its config.json; only "
            "'gelu' can be taken over"
        )
    return state


def _is_identity(state: State) -> bool:
    weight, bias = state.get("linear_2.weight"), state.get("linear_2.bias")
    if weight is None or bias is None:
        return False
    return torch.equal(weight, torch.eye(len(weight))) and not bool(bias.any())


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "architecture" in (file.metadata() or {})
    except Exception as error:
        raise UserError(f"federate.initial = {path}: not a safetensors file ({one_line(error)})") from None


def _tensors(files: list[Path]) -> State:
    """Tensors of projectors by their names in the files; of a whole model nothing else is read."""
    found: State = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    found |= {name: file.get_tensor(name) for name in file.keys() if _is_projectors(name)}
            else:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
                found |= {name: tensor for name, tensor in loaded.items() if _is_projectors(name)}
        except Exception as error:
            raise UserError(f"federate.initial = {path}: cannot be read: {one_line(error)}") from None
    return found


def _is_projectors(name: str) -> bool:
    return bool(_HUGGING_FACE.search(name) or _LLAVA.search(name))


def _mapped(path: Path, tensors: Mapping[str, Tensor]) -> State:
    """Weights under our names."""
    state: State = {}
    for name, tensor in tensors.items():
        ours = _our_name(name)
        if ours in state:
            raise UserError(f"federate.initial = {path}: several tensors are {ours}; give one projector")
        state[ours] = tensor.float().contiguous()
    if not state:
        raise UserError(
            f"federate.initial = {path}: no tensor named mm_projector.* or multi_modal_projector.linear_*; "
            "give a projector's weights"
        )
    return state


def _our_name(name: str) -> str:
    if match := _HUGGING_FACE.search(name):
        return match[1]
    match = _LLAVA.search(name)
    assert match is not None
    number, part = match.groups()
    return f"linear.{part}" if number is None else f"linear_{int(number) // 2 + 1}.{part}"


def llava_name(name: str) -> str:
    """LLaVA's name of a tensor of a linear or MLP projector."""
    layer, _, part = name.partition(".")
    number = "" if layer == "linear" else f"{2 * (int(layer.removeprefix('linear_')) - 1)}."
    return f"model.mm_projector.{number}{part}"


def _in_words(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {shape}"
