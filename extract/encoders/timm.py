"""Towers of timm: vision transformers, and convolutional networks by their feature maps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import Field

from fedcmp.extract.encoders import ENCODERS, LoadedEncoder, UserError
from fedcmp.extract.encoders.crop import CentreCrop
from fedcmp.extract.encoders.patches import LoadedPatchEncoder, PatchEncoder, check_layer, unloadable
from fedcmp.pipeline.errors import did_you_mean, one_line
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.hashes import fingerprint, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PREPARED = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@ENCODERS.register("timm")
class Timm(PatchEncoder):
    """Vision transformers and convolutional networks of timm.

    `layer` counts a transformer's blocks, and the feature maps of a network that makes ever smaller ones.

    Args:
        model: Architecture, with or without a tag (`vit_base_patch16_224.augreg_in21k`), `local-dir:/path`
            of a directory with `config.json` and weights, or `hf-hub:organisation/name`.
        weights: For an architecture: file of its weights (.safetensors, .bin, .pth, .npz).
        args: Arguments of the architecture that no configuration holds, such as
            `{ mlp_layer = "SwiGLUPacked", act_layer = "silu" }`; layers by their names in `timm.layers`.
        preprocessing: Replaces what the configuration says of `input_size`, `interpolation`, `mean`, `std`,
            `crop_pct` or `crop_mode`.
    """

    model: str
    weights: Path | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    preprocessing: dict[str, Any] = Field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """Weights, architecture and preprocessing, and the options.

        Raises:
            UserError: There is no such model.
        """
        found = _find(self)
        file = found.file(self.model)
        return {
            "name": "timm",
            "files": {file.name: sha256_file(file)},
            "config": fingerprint([found.architecture, found.args]),
            "preprocessing": found.preprocessing,
            **self.choices(),
        }

    def load(self, device: str, dtype: str) -> LoadedEncoder:
        """Load the tower, of which no block after `layer` is run.

        Raises:
            UserError: There is no such model, its weights do not fit, or the options do not.
        """
        return _Loaded(self, device, dtype)


@dataclass(frozen=True)
class _Found:
    """A model before it is loaded; `config` is what timm calls its pretrained configuration."""

    architecture: str
    args: dict[str, Any]
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    weights: Path | None

    def file(self, model: str) -> Path:
        """The file of the weights, which must be there."""
        if self.weights is not None and self.weights.is_file():
            return self.weights
        remedy = f"no weights at {self.weights}; set 'weights' to their file, or give 'hf-hub:timm/{model}'"
        if ":" in model:
            remedy = f"there is no {' or '.join(_WEIGHTS)}; give the directory of a saved timm model"
        raise UserError(f"extract.encoder.model = '{model}': {remedy}")


class _Loaded(LoadedPatchEncoder):
    def __init__(self, options: Timm, device: str, dtype: str) -> None:
        where = f"extract.encoder.model = '{options.model}'"
        found = _find(options, empty=device == "meta")
        size = found.preprocessing["input_size"]
        if len(size) != 3 or size[0] != 3 or size[1] != size[2]:
            raise UserError(f"{where}: takes images of {size}; give a model of square RGB pictures")
        tower = _tower(found, options.model, where, device)
        if not hasattr(tower, "forward_intermediates"):
            raise UserError(f"{where}: gives no feature maps; choose another, e.g. 'vit_base_patch16_224'")
        check_layer(options.layer, len(tower.feature_info))
        self._prefixed = "return_prefix_tokens" in inspect.signature(tower.forward_intermediates).parameters
        self._layer = options.layer
        self._tower = tower.to(device).eval().requires_grad_(False)
        self._has_cls = getattr(tower, "cls_token", None) is not None
        width, rows, columns = self._map(size[1], device, where)
        if rows != columns:
            raise UserError(f"{where}: its features are {rows}x{columns}; give a model with a square grid")
        super().__init__(
            options,
            device,
            dtype,
            grid=rows,
            width=width,
            has_cls=self._has_cls,
            mean=found.preprocessing["mean"],
            crop=_crop(found.preprocessing),
        )
        self._transform = _transform(
            found.preprocessing
            | ({} if options.resize == "crop" else {"crop_mode": "squash", "crop_pct": 1.0})
        )
        self._as_it_is = _transform(found.preprocessing | {"crop_mode": "center", "crop_pct": 1.0})

    def _map(self, side: int, device: str, where: str) -> tuple[int, int, int]:
        """Channels, rows and columns of the features of a picture."""
        import torch

        try:
            with torch.no_grad():
                _, features = self._features(torch.zeros(1, 3, side, side, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{where}: cannot encode a picture of {side}x{side}: {one_line(error)}; set input_size in "
                "extract.encoder.preprocessing, or img_size in extract.encoder.args"
            ) from None
        return features.shape[1], features.shape[2], features.shape[3]

    def _pixels(self, image: Image.Image, *, cropped: bool = False) -> np.ndarray:
        return (self._as_it_is if cropped else self._transform)(image).numpy()

    def _features(self, pixels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Prefix tokens `(batch, n, width)`, if any, and the map `(batch, width, rows, columns)`."""
        more = {"return_prefix_tokens": True} if self._prefixed else {}
        (found,) = self._tower.forward_intermediates(
            pixels, indices=[self._layer], stop_early=True, intermediates_only=True, **more
        )
        return (found[1], found[0]) if isinstance(found, tuple) else (None, found)

    def _states(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prefix, features = self._features(pixels)
        patches = features.flatten(2).transpose(1, 2)
        return prefix[:, :1] if self._has_cls and prefix is not None else patches[:, :0], patches


def _find(options: Timm, *, empty: bool = False) -> _Found:
    """Architecture, weights (unless `empty`) and preprocessing of a model; downloads what is not here."""
    schema, _, place = options.model.partition(":")
    where = f"extract.encoder.model = '{options.model}'"
    if schema not in ("local-dir", "hf-hub"):
        return _by_name(options, where)
    if options.weights is not None:
        raise UserError(f"{where}: brings its own weights; remove 'weights'")
    wanted = (_CONFIG,) if empty else (_CONFIG, *_WEIGHTS)
    directory = Path(place) if schema == "local-dir" else _downloaded(place, wanted, where)
    return _in_directory(options, directory, where)


def _downloaded(repository: str, wanted: Sequence[str], where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(wanted)))
    except Exception as error:
        raise UserError(
            f"{where}: cannot be downloaded: {one_line(error)}; download it where there is a network and use "
            "'local-dir:/path'"
        ) from None


def _in_directory(options: Timm, directory: Path, where: str) -> _Found:
    settings = read_json(directory / _CONFIG)
    if not isinstance(settings, dict) or not isinstance(settings.get("architecture"), str):
        raise UserError(
            f"{where}: {directory} has no {_CONFIG} that names an 'architecture'; give the directory of a "
            "saved timm model"
        )
    weights = next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)
    # Older configurations are flat.
    config = dict(settings.get("pretrained_cfg") or settings)
    args = dict(settings.get("model_args") or {})
    return _described(options, settings["architecture"], args, config, weights)


def _by_name(options: Timm, where: str) -> _Found:
    import timm

    architecture, _, tag = options.model.partition(".")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise UserError(f"{where}: timm has no such architecture{hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and options.model not in tags:
        raise UserError(f"{where}: no such tag; there are: {', '.join(tags) or 'none'}")
    if not tag and not options.preprocessing and len({fingerprint(_prepared(name)) for name in tags}) > 1:
        raise UserError(
            f"{where}: its trainings differ in how pictures are prepared; add the tag of your weights "
            f"({', '.join(name.partition('.')[2] for name in tags)}), or set extract.encoder.preprocessing"
        )
    config = timm.get_pretrained_cfg(options.model)
    return _described(options, architecture, {}, config.to_dict() if config else {}, options.weights)


def _prepared(name: str) -> dict[str, Any]:
    import timm

    config = timm.get_pretrained_cfg(name)
    return _preprocessing(config.to_dict() if config else {}, {}, {})


def _described(
    options: Timm, architecture: str, args: dict[str, Any], config: dict[str, Any], weights: Path | None
) -> _Found:
    args = {name: value for name, value in args.items() if name != "num_classes"} | options.args
    prepared = _preprocessing(config, args, options.preprocessing)
    return _Found(architecture, args, config, prepared, weights)


def _preprocessing(config: dict[str, Any], args: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """How pictures are prepared, as JSON values."""
    from timm.data.config import resolve_data_config

    unknown = set(changes) - set(_PREPARED)
    if unknown:
        raise UserError(
            f"extract.encoder.preprocessing.{min(unknown)}: no such key; there are: {', '.join(_PREPARED)}"
        )
    side = args.get("img_size")
    sized = {"input_size": (3, side, side)} if isinstance(side, int) else {}
    resolved = resolve_data_config({}, pretrained_cfg=config | sized)
    values = {name: resolved[name] for name in _PREPARED} | changes
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _tower(found: _Found, model: str, where: str, device: str) -> Any:
    """The model with its weights, all of which must fit; on the device `meta` without them."""
    import timm
    import torch

    args = {name: _layer(name, value) for name, value in found.args.items()}
    try:
        if device == "meta":
            with torch.device("meta"):
                return timm.create_model(found.architecture, num_classes=0, **args)
        config = {
            name: value
            for name, value in found.config.items()
            if name in timm.models.PretrainedCfg.__dataclass_fields__
            and name not in ("url", "hf_hub_id", "source")
        }
        file = found.file(model)
        if file.suffix == ".npz":
            config |= {"file": str(file), "custom_load": True}
        else:
            state = timm.models.load_state_dict(str(file), weights_only=True)
            # timm lets weights be missing where the head's classes differ from those of the configuration.
            head = config.get("classifier")
            rows = state.get(f"{head}.weight") if isinstance(head, str) else None
            config |= {
                "state_dict": state,
                "custom_load": False,
                "num_classes": 0 if rows is None else len(rows),
            }
        return timm.create_model(
            found.architecture,
            pretrained=True,
            pretrained_cfg=config,
            num_classes=config.get("num_classes", 1000),
            **args,
        )
    except UserError:
        raise
    except Exception as error:
        raise unloadable(where, error) from None


def _layer(name: str, value: Any) -> Any:
    """A layer by its name in `timm.layers`; what is none stays as it is."""
    import timm.layers

    named = name.endswith("_layer") and isinstance(value, str)
    return getattr(timm.layers, value, value) if named else value


def _transform(preprocessing: dict[str, Any]) -> Any:
    from timm.data.transforms_factory import create_transform

    return create_transform(
        **{**preprocessing, "input_size": tuple(preprocessing["input_size"])}, is_training=False
    )


def _crop(preprocessing: dict[str, Any]) -> CentreCrop | None:
    """What the transform does with shapes, where it resizes the shorter side and cuts out the centre."""
    side = preprocessing["input_size"][1]
    edge = math.floor(side / preprocessing["crop_pct"])
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}.get(
        preprocessing["interpolation"]
    )
    if preprocessing["crop_mode"] != "center" or resample is None or edge < side:
        return None
    return CentreCrop(edge, side, resample, lambda all_, kept: round((all_ - kept) / 2))
