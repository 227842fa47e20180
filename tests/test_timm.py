"""The encoder `timm`: parity with timm itself, in the layouts in which its models are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_llava
from PIL import Image
from safetensors.torch import save_file
from test_encoders import encode, pictures

from fedcmp.cli import main
from fedcmp.extract.encoders.timm import Timm
from fedcmp.extract.estimate import outlines
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Component

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}
PREPARED: dict[str, Any] = {
    "input_size": [3, 32, 32],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
}
# As their repositories say, but smaller: architecture, model_args, and what their cards add in code.
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "uni": (
        "vit_large_patch16_224",
        SMALL | {"patch_size": 8, "init_values": 1.0, "dynamic_img_size": True},
        {},
    ),
    "virchow": (
        "vit_huge_patch14_224",
        SMALL
        | {"patch_size": 8, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "reg_tokens": 4},
        {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"},
    ),
    "gigapath": (
        "vit_giant_patch14_dinov2",
        SMALL | {"patch_size": 8, "init_values": 1e-5, "mlp_ratio": 5.33334},
        {},
    ),
    "eva": ("eva02_tiny_patch14_224", SMALL | {"patch_size": 8}, {}),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"patch_size": 8}, {}),
    "siglip": ("vit_base_patch16_siglip_224", SMALL | {"patch_size": 8}, {}),
}
CONVOLUTIONAL = ["tf_efficientnet_lite0", "resnet10t", "convnext_atto", "mobilenetv3_small_050"]


def build(architecture: str, args: dict[str, Any], code: dict[str, Any], classes: int = 0) -> Any:
    import timm.layers

    torch.manual_seed(1)
    code = {name: getattr(timm.layers, value, value) for name, value in code.items()}
    model = timm.create_model(architecture, num_classes=classes, **args, **code).eval()
    for parameter in model.parameters():  # zeros and ones hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def publish(model: Any, folder: Path, name: str, args: dict[str, Any], *, flat: bool = False) -> Path:
    """A directory as timm's `push_to_hf_hub` writes it, or an older flat one with a pickled file."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {"num_classes": model.num_classes}
    of_model = {"classifier": model.pretrained_cfg["classifier"], "fixed_input_size": "img_size" in args}
    settings = PREPARED | of_model | classes
    config = (
        {"architecture": name, **settings} if flat else {"architecture": name, "pretrained_cfg": settings}
    )
    (folder / "config.json").write_text(json.dumps(config | classes | {"model_args": args}))
    if flat:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def prepared(images: list[Image.Image], **instead: Any) -> torch.Tensor:
    from timm.data import create_transform

    transform = create_transform(**PREPARED | instead | {"input_size": (3, 32, 32)}, is_training=False)
    return torch.stack([transform(image) for image in images])


@pytest.mark.parametrize("flat", [False, True], ids=["safetensors", "flat"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_give_the_outputs_of_their_blocks(shape: str, flat: bool, tmp_path: Path) -> None:
    name, args, code = SHAPES[shape]
    model = build(name, args, code)
    publish(model, tmp_path, name, args, flat=flat)
    seen: list[torch.Tensor] = []
    model.blocks[-2].register_forward_hook(lambda block, given, output: seen.append(output))
    with torch.no_grad():
        model.forward_features(prepared(pictures()))
    prefix, has_cls = model.num_prefix_tokens, model.cls_token is not None
    for tokens in ("patch", "cls_patch"):
        options = Timm(model=f"local-dir:{tmp_path}", tokens=tokens, args=code)
        if tokens == "cls_patch" and not has_cls:
            with pytest.raises(UserError, match="has no CLS token"):
                options.load("cpu", "float32")
            continue
        encoder = options.load("cpu", "float32")
        wanted = torch.cat([seen[0][:, : tokens == "cls_patch"], seen[0][:, prefix:]], 1)
        assert (encoder.patches, encoder.d_vision) == wanted.shape[1:]
        torch.testing.assert_close(encode(encoder, pictures()), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_towers_give_their_feature_maps(name: str, tmp_path: Path) -> None:
    model = build(name, {}, {}, classes=10)
    publish(model, tmp_path, name, {})
    with torch.no_grad():
        maps = model.forward_intermediates(prepared(pictures()), intermediates_only=True)
    for layer in (-1, -2, -len(maps)):
        encoder = Timm(model=f"local-dir:{tmp_path}", layer=layer).load("cpu", "float32")
        assert (encoder.patches, encoder.d_vision) == (maps[layer][0, 0].numel(), maps[layer].shape[1])
        wanted = maps[layer].flatten(2).transpose(1, 2)
        torch.testing.assert_close(encode(encoder, pictures()), wanted, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=f"the model has only {len(maps)} blocks"):
        Timm(model=f"local-dir:{tmp_path}", layer=-len(maps) - 1).load("cpu", "float32")


def test_no_block_after_the_layer_is_run(tmp_path: Path) -> None:
    name, args, code = SHAPES["uni"]
    publish(build(name, args, code), tmp_path, name, args)
    encoder = Timm(model=f"local-dir:{tmp_path}").load("cpu", "float32")
    ran = []
    for number, block in enumerate(encoder._tower.blocks):  # type: ignore[attr-defined]
        block.register_forward_hook(lambda *given, number=number: ran.append(number))
    encode(encoder, pictures())
    assert ran == [0, 1]


def test_pictures_are_prepared_as_timm_does(tmp_path: Path) -> None:
    name, args, code = SHAPES["uni"]
    publish(build(name, args, code), tmp_path, name, args)
    wide = pictures(1)[0].resize((90, 41))
    ours = Timm(model=f"local-dir:{tmp_path}").load("cpu", "float32")
    assert np.array_equal(ours.preprocess(wide), prepared([wide])[0].numpy())
    squashed = Timm(model=f"local-dir:{tmp_path}", resize="squash").load("cpu", "float32")
    assert np.array_equal(
        squashed.preprocess(wide), prepared([wide], crop_mode="squash", crop_pct=1.0)[0].numpy()
    )
    # So elongated that the edges must not be enlarged: the same pixels still.
    strip = pictures(1)[0].resize((20_000, 20))
    assert np.array_equal(ours.preprocess(strip), prepared([strip])[0].numpy())


def test_a_named_architecture_takes_its_weights_from_a_file(tmp_path: Path) -> None:
    model = build("tf_efficientnet_lite0", {}, {}, classes=1000)
    file = tmp_path / "lite0.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    options = Timm(model="tf_efficientnet_lite0.in1k", weights=file, layer=-1)
    encoder = options.load("cpu", "float32")
    assert (encoder.patches, encoder.d_vision) == (49, 320)
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack([encoder.preprocess(image) for image in pictures()]))
        wanted = model.forward_intermediates(pixels, indices=[-1], intermediates_only=True)[0]
    torch.testing.assert_close(encoder.encode(pixels), wanted.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    assert options.identity()["preprocessing"]["mean"] == [0.5, 0.5, 0.5]


def test_what_decides_a_feature_is_in_the_identity(tmp_path: Path) -> None:
    name, args, code = SHAPES["uni"]
    folder = publish(build(name, args, code), tmp_path / "a", name, args)
    place = f"local-dir:{folder}"
    first = Timm(model=place).identity()
    assert first == Timm(model=place).identity()
    changed = [
        Timm(model=place, preprocessing={"crop_pct": 1.0}).identity(),
        Timm(model=place, args={"init_values": 0.5}).identity(),
        Timm(model=place, layer=-1).identity(),
    ]
    model = build(name, args, code)
    model.cls_token.data.add_(1)
    changed.append(Timm(model=f"local-dir:{publish(model, tmp_path / 'b', name, args)}").identity())
    assert len({json.dumps(each) for each in [first, *changed]}) == 5


def test_missing_or_foreign_weights_are_never_random(tmp_path: Path) -> None:
    name, args, code = SHAPES["uni"]
    model = build(name, args, code)
    publish(model, tmp_path, name, args)
    state = model.state_dict()
    for wrong in ({k: v for k, v in state.items() if "blocks.1" not in k}, state | {"more": torch.ones(1)}):
        save_file({k: v.contiguous() for k, v in wrong.items()}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"cannot be loaded: .*(Missing|Unexpected) key"):
            Timm(model=f"local-dir:{tmp_path}").load("cpu", "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_base_patch16_225"}, "no such architecture.*vit_base_patch16_224"),
        ({"model": "vit_base_patch16_224.mine"}, "no such tag; there are: .*augreg_in21k"),
        ({"model": "vit_base_patch16_224"}, r"add the tag of your weights \(.*augreg_in21k"),
        ({"model": "resnet10t"}, "no weights at None; set 'weights' .* 'hf-hub:timm/resnet10t'"),
        ({"model": "resnet10t", "weights": "nowhere.pth"}, "no weights at nowhere.pth"),
        ({"model": "local-dir:nowhere"}, "nowhere has no config.json that names an 'architecture'"),
        ({"model": "local-dir:x", "weights": "y.pth"}, "brings its own weights; remove 'weights'"),
        ({"model": "resnet10t", "preprocessing": {"size": 3}}, "preprocessing.size: no such key.*input_size"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Timm(**options).identity()


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    (first, *_) = outlines(Component.model_validate({"name": "timm", "model": "vit_large_patch14_dinov2"}))
    assert (first.patches, first.d_vision) == (1369, 1024)
    name, args, _ = SHAPES["gigapath"]
    config = {"architecture": name, "pretrained_cfg": PREPARED, "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (first, *_) = outlines(Component.model_validate({"name": "timm", "model": f"local-dir:{tmp_path}"}))
    assert (first.patches, first.d_vision) == (16, 24)


def test_extraction_through_the_command_line(tmp_path: Path) -> None:
    name, args, code = SHAPES["virchow"]
    publish(build(name, args, code), tmp_path / "model", name, args)
    pairs = write_llava(tmp_path / "silo", 5)
    words = ", ".join(f'{key} = "{value}"' for key, value in code.items())
    config = tmp_path / "own.toml"
    config.write_text(
        f"""
experiment = "own"
features = "{tmp_path}/features"
build = "{tmp_path}/build"
[extract]
encoder = {{ name = "timm", model = "local-dir:{tmp_path}/model", args = {{ {words} }} }}
silos = {{ a = {{ name = "llava_json", path = "{pairs}", images = "{pairs.parent}" }} }}
[language]
path = "{tmp_path}/llm"
[federate]
silos = ["a"]
"""
    )
    result = CliRunner().invoke(main, ["extract", str(config)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    cache = FeatureCache(tmp_path / "features" / "a.zarr")
    assert (cache.patches, cache.d_vision, len(cache.ids)) == (16, 24, 5)
    again = CliRunner().invoke(main, ["extract", str(config)], catch_exceptions=False)
    assert "extracted" not in again.output
