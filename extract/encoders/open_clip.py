"""Vision towers of open_clip: a named architecture with weights, a local directory, or a hub repository."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fedcmp.extract.encoders import ENCODERS, LoadedEncoder
from fedcmp.extract.encoders.crop import CentreCrop
from fedcmp.extract.encoders.patches import LoadedPatchEncoder, PatchEncoder, check_layer, unloadable
from fedcmp.pipeline.errors import UserError, did_you_mean, one_line
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.hashes import fingerprint, sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

_CONFIG = "open_clip_config.json"
_QUICK = "-quickgelu"


@ENCODERS.register("open_clip")
class OpenClip(PatchEncoder):
    """Vision transformers of open_clip, its own and those it takes from timm.

    Args:
        model: Architecture (`ViT-L-14-336-quickgelu`), `local-dir:/path` of a directory with
            `open_clip_config.json` and weights, or `hf-hub:organisation/name`.
        pretrained: For an architecture: file of its weights (.safetensors, .bin, .pt), or a tag of
            open_clip, which downloads them once.
        configs: Directory with further architectures, one JSON file each.
    """

    model: str
    pretrained: str | None = None
    configs: Path | None = None

    def identity(self) -> dict[str, Any]:
        """Weights, vision configuration and preprocessing, and the options.

        Raises:
            UserError: There is no such model, or its weights want another activation function.
        """
        found = _find(self)
        return {
            "name": "open_clip",
            "files": {path.name: sha256_file(path) for path in found.weights},
            "config": fingerprint({key: found.config.get(key) for key in _DECIDES}),
            "preprocessing": found.preprocessing,
            **self.choices(),
        }

    def load(self, device: str, dtype: str) -> LoadedEncoder:
        """Load the tower without the blocks after `layer`.

        Raises:
            UserError: There is no such model, its weights do not fit, or the options do not.
        """
        return _Loaded(self, device, dtype)


_DECIDES = ("embed_dim", "vision_cfg", "quick_gelu")


@dataclass(frozen=True)
class _Found:
    """A model before it is loaded: `name` and `pretrained` are what open_clip is asked for."""

    name: str
    pretrained: str | None
    config: dict[str, Any]
    weights: tuple[Path, ...]
    preprocessing: dict[str, Any]


class _Loaded(LoadedPatchEncoder):
    def __init__(self, options: OpenClip, device: str, dtype: str) -> None:
        library = _library()
        empty = device == "meta"
        found = _architecture(options) if empty else _find(options)
        where = f"extract.encoder.model = '{options.model}'"
        try:
            if "hf_model_name" in (found.config.get("text_cfg") or {}):
                visual = _alone(found, "meta" if empty else "cpu")
            elif empty:
                visual = _shapes(found.name, library).visual
            else:
                visual = library.create_model(found.name, found.pretrained, require_pretrained=True).visual
        except Exception as error:
            raise unloadable(where, error) from None
        visual.eval().requires_grad_(False)
        trunk = getattr(visual, "trunk", None)
        tower = visual if trunk is None else trunk
        blocks = _blocks(tower)
        size, grid = _pair(visual.image_size), _grid(tower)
        if not blocks or grid is None or grid[0] != grid[1]:
            raise UserError(
                f"{where}: no vision transformer over a square grid of patches; choose one, e.g. 'ViT-B-16'"
            )
        if size != _pair(found.preprocessing["size"]):
            raise UserError(
                f"{where}: its tower takes images of {size}, its configuration says "
                f"{found.preprocessing['size']}; set image_size in vision_cfg"
            )
        super().__init__(
            options,
            device,
            dtype,
            grid=grid[0],
            width=visual.conv1.out_channels if trunk is None else trunk.embed_dim,
            has_cls=trunk is None or getattr(trunk, "cls_token", None) is not None,
            mean=found.preprocessing["mean"],
            crop=_crop(found.preprocessing),
        )
        check_layer(options.layer, len(blocks))
        tower.prune_intermediate_layers([options.layer])
        self._visual = visual.to(device)
        self._transform = _transform(found.preprocessing, options.resize)

    def _pixels(self, image: Image.Image, *, cropped: bool = False) -> np.ndarray:
        # What has its size already is neither resized nor cropped again.
        return self._transform(image).numpy()

    def _states(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._visual.forward_intermediates(
            pixels,
            indices=[-1],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        patches = found["image_intermediates"][0]
        prefix = found.get("image_intermediates_prefix", [patches[:, :0]])[0]
        return prefix[:, :1], patches


def _alone(found: _Found, device: str) -> Any:
    """The vision tower by itself: open_clip looks on the hub for a text tower of Hugging Face's."""
    import torch
    from open_clip.factory import load_state_dict
    from open_clip.model import _build_vision_tower

    vision = found.config["vision_cfg"] | {"timm_model_pretrained": False}
    with torch.device(device):
        tower = _build_vision_tower(found.config["embed_dim"], vision, found.config.get("quick_gelu", False))
    if device != "meta":
        state = load_state_dict(str(found.weights[0]))
        parts = {name.partition("visual.")[2]: state[name] for name in state if name.startswith("visual.")}
        tower.load_state_dict(parts)
    return tower


def _shapes(name: str, library: Any) -> Any:
    """A model on the device `meta`."""
    import torch

    logging.disable(logging.WARNING)  # it warns that weights are missing
    try:
        with torch.device("meta"):
            return library.create_model(name, load_weights=False, device="meta")
    finally:
        logging.disable(logging.NOTSET)


def _library() -> Any:
    """The open_clip package.

    Raises:
        UserError: It, or the torchvision it needs, is missing or broken.
    """
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        if "torchvision" in str(error):
            raise unloadable("extract.encoder.name = 'open_clip'", error) from None
        raise UserError(
            f"extract.encoder.name = 'open_clip': cannot be imported: {one_line(error)}; pip install "
            "'open_clip_torch>=3.0', or use the encoder 'transformers'"
        ) from None
    return open_clip


def _find(options: OpenClip) -> _Found:
    """Configuration, weights and preprocessing of a model; downloads what is not here."""
    library = _library()
    schema, _, place = options.model.partition(":")
    if schema in ("local-dir", "hf-hub"):
        if options.pretrained is not None or options.configs is not None:
            raise UserError(
                f"extract.encoder.model = '{options.model}': brings its own configuration and weights; "
                "remove 'pretrained' and 'configs'"
            )
        return _in_directory(options.model, Path(place)) if schema == "local-dir" else _on_hub(options.model)
    return _by_name(options, library)


def _architecture(options: OpenClip) -> _Found:
    """A model of which no weights are needed."""
    schema, _, place = options.model.partition(":")
    if schema in ("local-dir", "hf-hub"):
        settings = read_json(Path(place) / _CONFIG) if schema == "local-dir" else _hub_settings(place)
        return _described(options.model, settings, [])
    name, config = _named(options, _library())
    return _Found(name, None, config, (), _preprocessing(config, {}))


def _in_directory(model: str, directory: Path) -> _Found:
    settings = read_json(directory / _CONFIG)
    # What it would load; which of several files that is, open_clip alone knows.
    weights = _library().factory._find_checkpoint_in_dir(directory) if directory.is_dir() else None
    if weights is None or settings is None:
        raise UserError(
            f"extract.encoder.model = '{model}': {directory} has no {_CONFIG} with weights (.safetensors, "
            ".bin or .pth); give the directory of a saved open_clip model"
        )
    return _described(model, settings, [Path(weights)])


def _on_hub(model: str) -> _Found:
    from open_clip.pretrained import download_pretrained_from_hf

    repository = model.partition(":")[2]
    try:
        settings = _hub_settings(repository)
        weights = Path(download_pretrained_from_hf(repository))
    except Exception as error:
        raise UserError(
            f"extract.encoder.model = '{model}': cannot be downloaded: {one_line(error)}; download it where "
            "there is a network and use 'local-dir:/path'"
        ) from None
    return _described(model, settings, [weights])


def _hub_settings(repository: str) -> Any:
    from open_clip.pretrained import download_pretrained_from_hf

    return read_json(Path(download_pretrained_from_hf(repository, filename=_CONFIG)))


def _described(model: str, settings: Any, weights: list[Path]) -> _Found:
    try:
        config = settings["model_cfg"]
        config["vision_cfg"]["image_size"]
    except (KeyError, TypeError):
        raise UserError(
            f"extract.encoder.model = '{model}': its {_CONFIG} lacks model_cfg.vision_cfg.image_size; give "
            "an open_clip model"
        ) from None
    preprocessing = _preprocessing(config, settings.get("preprocess_cfg", {}))
    return _Found(model, None, config, tuple(weights), preprocessing)


def _named(options: OpenClip, library: Any) -> tuple[str, dict[str, Any]]:
    """open_clip's name of an architecture, and its configuration."""
    name = options.model.replace("/", "-")
    if options.configs is not None:
        if not options.configs.is_dir():
            raise UserError(f"extract.encoder.configs = {options.configs}: no such directory")
        library.add_model_config(options.configs)
    config = library.get_model_config(name)
    if config is None:
        hint = did_you_mean(name, library.list_models())
        raise UserError(
            f"extract.encoder.model = '{options.model}': open_clip has no such architecture{hint}"
        )
    return name, config


def _by_name(options: OpenClip, library: Any) -> _Found:
    name, config = _named(options, library)
    where = f"extract.encoder.model = '{options.model}'"
    tag = options.pretrained
    if tag is None:
        raise UserError(f"{where}: 'pretrained' is missing; set it to the file of the weights, or to a tag")
    known = library.get_pretrained_cfg(name, tag)
    known = known or library.get_pretrained_cfg(name.removesuffix(_QUICK), tag)
    if known:
        _check_gelu(name, config, f"the tag '{tag}'", known.get("quick_gelu", False), library)
        weights = _download(known, tag, library)
        return _Found(name, str(weights), config, (weights,), _preprocessing(config, known))
    weights = Path(tag)
    if not weights.is_file():
        tags = ", ".join(library.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"extract.encoder.pretrained = '{tag}': neither a file nor a tag of {name}; tags: {tags}"
        )
    beside = read_json(weights.parent / _CONFIG)
    if beside is None:
        prepared = _usual(name, tag, config, library)
    else:
        quick = beside.get("model_cfg", {}).get("quick_gelu", False)
        _check_gelu(name, config, f"{_CONFIG} beside the weights", quick, library)
        prepared = _preprocessing(config, beside.get("preprocess_cfg", {}))
    return _Found(name, tag, config, (weights,), prepared)


def _check_gelu(name: str, config: dict[str, Any], who: str, quick: bool, library: Any) -> None:
    """Refuse weights trained with another activation: features would be off by about 1e-2, silently."""
    if "timm_model_name" in config["vision_cfg"] or bool(config.get("quick_gelu", False)) == bool(quick):
        return
    other = name + _QUICK if quick else name.removesuffix(_QUICK)
    remedy = f"set model = '{other}'"
    if other == name or other not in library.list_models():
        remedy = f"set quick_gelu = {str(bool(quick)).lower()} in the configuration of {name}"
    raise UserError(
        f"extract.encoder.model = '{name}': computes with {'GELU' if quick else 'QuickGELU'}, but {who} says "
        f"the weights were trained with {'QuickGELU' if quick else 'GELU'}; {remedy}"
    )


def _download(known: dict[str, Any], tag: str, library: Any) -> Path:
    try:
        return Path(library.download_pretrained(known))
    except Exception as error:
        raise UserError(
            f"extract.encoder.pretrained = '{tag}': cannot be downloaded: {one_line(error)}; download the "
            "weights where there is a network and give their file"
        ) from None


def _usual(name: str, file: str, config: dict[str, Any], library: Any) -> dict[str, Any]:
    """How pictures are prepared for every known training of an architecture with this activation.

    open_clip prepares them as OpenAI's for any file, which is wrong for SigLIP and others.
    """
    tags = [library.get_pretrained_cfg(name, tag) for tag in library.list_pretrained_tags_by_model(name)]
    quick = config.get("quick_gelu", False)
    ways = [_preprocessing(config, known) for known in tags if known.get("quick_gelu", False) == quick]
    if any(way != ways[0] for way in ways):
        raise UserError(
            f"extract.encoder.pretrained = '{file}': weights of {name} differ in how pictures are prepared, "
            f"and nothing says which these are; put their repository's {_CONFIG} beside the file"
        )
    return ways[0] if ways else _preprocessing(config, {})


def _preprocessing(config: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Every option of open_clip's picture preparation as JSON values, its defaults under what is known."""
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), known)
    merged["size"] = config["vision_cfg"].get("image_size", 224)
    values = asdict(PreprocessCfg(**merged))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _transform(preprocessing: dict[str, Any], resize: str) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    changed = {} if resize == "crop" else {"resize_mode": "squash"}
    return image_transform_v2(PreprocessCfg(**(preprocessing | changed)), is_train=False)


def _crop(preprocessing: dict[str, Any]) -> CentreCrop | None:
    """What the transform does with shapes, where it resizes the shorter side and cuts out the centre."""
    height, width = _pair(preprocessing["size"])
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}.get(
        preprocessing["interpolation"]
    )
    if preprocessing["resize_mode"] != "shortest" or height != width or resample is None:
        return None
    return CentreCrop(height, height, resample, lambda all_, kept: round((all_ - kept) / 2))


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _blocks(tower: Any) -> Any:
    """Transformer blocks of a tower of open_clip or of timm; none where it is no transformer."""
    stack = getattr(tower, "transformer", None)
    return getattr(tower, "blocks", ()) if stack is None else stack.resblocks


def _grid(tower: Any) -> Any:
    """Rows and columns of patches, or None where a tower has no such grid."""
    return getattr(getattr(tower, "patch_embed", tower), "grid_size", None)
