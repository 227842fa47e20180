from __future__ import annotations

import builtins
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import picture, write_llava
from PIL import Image
from pydantic import ValidationError

from fedcmp.cli import main
from fedcmp.extract.encoders.base import ENCODERS, LoadedEncoder
from fedcmp.extract.encoders.open_clip import OpenClip
from fedcmp.extract.encoders.patches import expand_to_square, pool_squares
from fedcmp.extract.encoders.transformers import FAMILIES, Transformers
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Component

SIZE = {"height": 32, "width": 32}
SHAPE: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
MLP = {"intermediate_size": 48, "image_size": 32}


def clip() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE)
    return CLIPVisionModel(CLIPVisionConfig(**SHAPE, **MLP, hidden_act="quick_gelu")), processor


def siglip() -> tuple[Any, Any]:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**SHAPE, **MLP)), SiglipImageProcessorPil(size=SIZE)


def siglip_with_text() -> tuple[Any, Any]:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    text = {key: SHAPE[key] for key in SHAPE if key != "patch_size"} | {"vocab_size": 20}
    config = SiglipConfig(text_config=text | {"intermediate_size": 48}, vision_config={**SHAPE, **MLP})
    return SiglipModel(config), SiglipImageProcessorPil(size=SIZE)


def siglip2() -> tuple[Any, Any]:
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

    model = Siglip2VisionModel(Siglip2VisionConfig(**SHAPE, intermediate_size=48, num_patches=9))
    return model, Siglip2ImageProcessorPil(patch_size=8, max_num_patches=17)


def dinov2() -> tuple[Any, Any]:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    # As published: trained at another size than the processor gives, and cropped from a larger one.
    processor = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIZE)
    return Dinov2Model(Dinov2Config(**SHAPE, image_size=72, mlp_ratio=2)), processor


def dinov2_with_registers() -> tuple[Any, Any]:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(**SHAPE, image_size=72, mlp_ratio=2, num_register_tokens=3)
    return Dinov2WithRegistersModel(config), dinov2()[1]


def dinov3() -> tuple[Any, Any]:
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

    config = DINOv3ViTConfig(**SHAPE, intermediate_size=48, image_size=72, num_register_tokens=4)
    return DINOv3ViTModel(config), DINOv3ViTImageProcessor(size=SIZE)


def aimv2(native: bool = False) -> tuple[Any, Any]:
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    config = Aimv2VisionConfig(**SHAPE, **MLP | {"image_size": 72 if native else 32}, is_native=native)
    return Aimv2VisionModel(config), clip()[1]


def aimv2_native() -> tuple[Any, Any]:
    return aimv2(native=True)


# Tokens before the patches, of which the first is the CLS token.
PREFIX: dict[Callable[[], tuple[Any, Any]], int] = {
    clip: 1,
    siglip: 0,
    siglip_with_text: 0,
    siglip2: 0,
    dinov2: 1,
    dinov2_with_registers: 4,
    dinov3: 5,
    aimv2: 0,
    aimv2_native: 0,
}
MAKERS = [pytest.param(maker, id=maker.__name__) for maker in PREFIX]


def save(maker: Callable[[], tuple[Any, Any]], folder: Path) -> Path:
    torch.manual_seed(3)
    model, processor = maker()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tokens and positions are born zero or tiny
            if any(word in name for word in ("token", "position", "embed")):
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(number: int = 2) -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture(seed))).convert("RGB") for seed in range(number)]


def encode(encoder: LoadedEncoder, images: list[Image.Image]) -> torch.Tensor:
    return encoder.encode(torch.from_numpy(np.stack([encoder.preprocess(image) for image in images])))


def whole_model(folder: Path, images: list[Image.Image], **instead: Any) -> tuple[torch.Tensor, ...]:
    """Every hidden state of the model as transformers runs it."""
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModel.from_pretrained(folder).eval()
    inputs = processor(images, return_tensors="pt", **instead)
    with torch.no_grad():
        return getattr(model, "vision_model", model)(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_features_are_the_hidden_states_of_the_whole_model(
    maker: Callable[[], tuple[Any, Any]], layer: int, tmp_path: Path
) -> None:
    folder = save(maker, tmp_path)
    resize = "pad" if maker is siglip2 else "crop"
    images = pictures()
    encoder = Transformers(path=folder, layer=layer, resize=resize).load("cpu", "float32")
    if resize == "pad":
        images = [expand_to_square(image, (127, 127, 127)) for image in images]
    states = whole_model(folder, images)
    assert len(states) == 4
    features = encode(encoder, images)
    assert features.shape == (2, encoder.patches, encoder.d_vision) == (2, 16, 24)
    assert features.dtype == torch.float32
    wanted = states[layer][:, PREFIX[maker] :][:, :16]
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)
    if PREFIX[maker]:
        both = encode(
            Transformers(path=folder, layer=layer, tokens="cls_patch").load("cpu", "float32"), images
        )
        torch.testing.assert_close(both, torch.cat([states[layer][:, :1], wanted], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 40), (57, 33), (31, 90)])
@pytest.mark.parametrize("maker", [each for each in MAKERS if each.values[0] is not siglip2])
def test_pixels_are_the_processors_own_to_the_byte(
    maker: Callable[[], tuple[Any, Any]], size: tuple[int, int], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    folder = save(maker, tmp_path)
    image = Image.fromarray(np.random.default_rng(5).integers(256, size=(*size, 3), dtype=np.uint8))
    wanted = AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="np")
    pixels = Transformers(path=folder).load("cpu", "float32").preprocess(image)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, wanted["pixel_values"][0])


@pytest.mark.parametrize("maker", MAKERS)
def test_blocks_after_the_layer_are_not_run(
    maker: Callable[[], tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(maker, tmp_path)
    model, _ = maker()
    tower = getattr(model, "vision_model", model)
    block = type(tower.get_submodule(FAMILIES[model.config.model_type].blocks)[0])
    forward, ran = block.forward, []
    monkeypatch.setattr(
        block, "forward", lambda self, *args, **words: ran.append(1) or forward(self, *args, **words)
    )
    for layer, blocks in ((-1, 3), (-2, 2), (-3, 1)):
        encoder = Transformers(path=folder, layer=layer, resize="squash").load("cpu", "float32")
        ran.clear()
        encode(encoder, pictures())
        assert len(ran) == blocks
        assert not encoder._seen  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="layer = -4: the model has only 3 blocks"):
        Transformers(path=folder, layer=-4, resize="squash").load("cpu", "float32")


@pytest.mark.parametrize("maker", [clip, siglip2, dinov3, aimv2])
def test_bfloat16_is_near_float32(maker: Callable[[], tuple[Any, Any]], tmp_path: Path) -> None:
    options = Transformers(path=save(maker, tmp_path), resize="squash")
    exact, fast = (encode(options.load("cpu", dtype), pictures()) for dtype in ("float32", "bfloat16"))
    assert fast.dtype == torch.float32
    assert 0 < (exact - fast).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("maker", [siglip, siglip2, aimv2])
def test_a_model_without_cls_refuses_to_give_one(
    maker: Callable[[], tuple[Any, Any]], tmp_path: Path
) -> None:
    options = Transformers(path=save(maker, tmp_path), tokens="cls_patch", resize="squash")
    with pytest.raises(UserError, match=r"tokens = 'cls_patch': this model has no CLS token; set tokens"):
        options.load("cpu", "float32")


def test_pictures_of_many_sizes_need_a_square(tmp_path: Path) -> None:
    naflex = save(siglip2, tmp_path / "naflex")
    with pytest.raises(UserError, match=r"resize = 'crop': .* keeps every picture's aspect ratio"):
        Transformers(path=naflex).load("cpu", "float32")
    uncropped = save(dinov2, tmp_path / "uncropped")
    settings = uncropped / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace('"do_center_crop": true', '"do_center_crop": false'))
    with pytest.raises(UserError, match=r"gives pixels \(3, 40, 80\).*or resize to 'pad' or 'squash'"):
        Transformers(path=uncropped).load("cpu", "float32")
    assert Transformers(path=uncropped, resize="pad").load("cpu", "float32").patches == 25


def test_unknown_model_types_are_told_what_is_supported(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**SHAPE, **MLP)).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"a model of type 'vit'; supported: clip, .*siglip.*dinov2.*dinov3_vit.*aimv2"
    ):
        Transformers(path=tmp_path).load("cpu", "float32")


def test_weights_that_are_not_there_are_not_invented(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(siglip, tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file(
        {name: weights[name] for name in weights if name != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"its weights lack .*layers\.1\.mlp\.fc1\.weight"):
        Transformers(path=folder).load("cpu", "float32")


def test_pooling_by_hand() -> None:
    grid = torch.arange(2 * 16 * 3, dtype=torch.float32).view(2, 4, 4, 3) ** 1.5
    mean = pool_squares(grid.flatten(1, 2), 2, "mean")
    shuffled = pool_squares(grid.flatten(1, 2), 2, "pixel_shuffle")
    assert mean.shape == (2, 4, 3)
    assert shuffled.shape == (2, 4, 12)
    for row in range(2):
        for column in range(2):
            square = [grid[:, 2 * row + y, 2 * column + x] for y in range(2) for x in range(2)]
            torch.testing.assert_close(mean[:, 2 * row + column], sum(square) / 4)
            assert torch.equal(shuffled[:, 2 * row + column], torch.cat(square, -1))
    assert torch.equal(pool_squares(grid.flatten(1, 2), 1, "mean"), grid.flatten(1, 2))


@pytest.mark.parametrize("side", [2, 3])
def test_pixel_shuffle_is_that_of_idefics3_and_internvl(side: int) -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel

    patches = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    ours = pool_squares(patches, side, "pixel_shuffle")
    assert torch.equal(ours, Idefics3Connector.pixel_shuffle(None, patches, side))
    if side == 2:  # InternVL's scale_factor is a float, which a third is not exactly
        theirs = InternVLModel.pixel_shuffle(None, patches.unflatten(1, (6, 6)), scale_factor=1 / side)
        assert torch.equal(ours, theirs.flatten(1, 2))


def test_pooling_as_an_option(tmp_path: Path) -> None:
    folder = save(dinov2_with_registers, tmp_path)
    plain = encode(Transformers(path=folder).load("cpu", "float32"), pictures())
    for pooling, width in (("mean", 24), ("pixel_shuffle", 96)):
        encoder = Transformers(path=folder, pool=2, pooling=pooling).load("cpu", "float32")
        features = encode(encoder, pictures())
        assert features.shape == (2, encoder.patches, encoder.d_vision) == (2, 4, width)
        torch.testing.assert_close(features, pool_squares(plain, 2, pooling))
    for options, message in (
        ({"pool": 3}, "pool = 3: needs tokens = 'patch' and a divisor of the 4x4 grid"),
        ({"pool": 2, "tokens": "cls_patch"}, "pool = 2: needs tokens"),
        ({"pooling": "pixel_shuffle"}, "pooling = 'pixel_shuffle': has no effect with pool = 1"),
    ):
        with pytest.raises(UserError, match=message):
            Transformers(path=folder, **options).load("cpu", "float32")


def test_padding_is_expand2square() -> None:
    image = Image.new("RGB", (7, 4), (255, 0, 0))
    wide = np.asarray(expand_to_square(image, (10, 20, 30)))
    assert wide.shape == (7, 7, 3)
    assert (wide[:1] == (10, 20, 30)).all()
    assert (wide[1:5] == (255, 0, 0)).all()
    assert (wide[5:] == (10, 20, 30)).all()
    tall = np.asarray(expand_to_square(image.transpose(Image.Transpose.ROTATE_90), (10, 20, 30)))
    assert (tall == wide.swapaxes(0, 1)).all()
    square = Image.new("RGB", (5, 5))
    assert expand_to_square(square, (1, 2, 3)) is square
    with pytest.raises(ValueError, match="60000x2 pixels are too elongated"):
        expand_to_square(Image.new("RGB", (60_000, 2)), (0, 0, 0))


def edge_picture() -> Image.Image:
    """Twice as wide as high; only the left and right quarters are white."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :32] = pixels[:, 96:] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_resize_modes_show_what_they_say(library: str, tmp_path: Path) -> None:
    folder = save(clip, tmp_path / "clip")
    make: Callable[..., Any] = Transformers
    place: dict[str, Any] = {"path": folder}
    if library == "open_clip":
        make, place = OpenClip, {"model": f"local-dir:{to_open_clip(folder, tmp_path / 'open')}"}
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    shown = {}
    for mode in ("crop", "pad", "squash"):
        pixels = make(**place, resize=mode).load("cpu", "float32").preprocess(edge_picture())
        assert pixels.shape == (3, 32, 32)
        assert pixels.dtype == np.float32
        shown[mode] = pixels.transpose(1, 2, 0) * OPENAI_CLIP_STD + OPENAI_CLIP_MEAN
    assert np.abs(shown["crop"][:, 2:-2]).max() < 0.05
    middle = shown["squash"][16, :, 0]
    assert np.abs(middle[[0, 4, 27, 31]] - 1).max() < 0.05
    assert np.abs(middle[12:20]).max() < 0.05
    mean = [int(value * 255) / 255 for value in OPENAI_CLIP_MEAN]
    np.testing.assert_allclose(shown["pad"][:6], np.broadcast_to(mean, (6, 32, 3)), atol=1e-3)
    np.testing.assert_allclose(shown["pad"][-6:], np.broadcast_to(mean, (6, 32, 3)), atol=1e-3)
    assert np.abs(shown["pad"][16, [0, 4, 27, 31]] - 1).max() < 0.05
    assert np.abs(shown["pad"][16, 12:20]).max() < 0.05


def test_pad_shows_the_whole_picture_even_where_the_processor_crops(tmp_path: Path) -> None:
    folder = save(dinov2, tmp_path)
    images = pictures()
    mean = tuple(int(value * 255) for value in (0.48145466, 0.4578275, 0.40821073))
    for mode in ("pad", "squash"):
        features = encode(Transformers(path=folder, resize=mode).load("cpu", "float32"), images)
        shown = [expand_to_square(image, mean) for image in images] if mode == "pad" else images
        states = whole_model(folder, shown, size=SIZE, do_center_crop=False)
        torch.testing.assert_close(features, states[-2][:, 1:], rtol=0, atol=1e-5)


def changed(folder: Path, **options: Any) -> dict[str, Any]:
    return Transformers(path=folder, **options).identity()


def test_identity_holds_what_decides_features(tmp_path: Path) -> None:
    folder = save(siglip, tmp_path / "a")
    plain = changed(folder)
    assert set(plain) == {"name", "files", "layer", "tokens", "pool", "orientation", "transparency"}
    assert set(plain["files"]) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert plain == changed(folder, layer=-2, resize="crop", pooling="mean")
    others = [
        changed(folder, layer=-1),
        changed(folder, resize="pad"),
        changed(folder, resize="squash"),
        changed(folder, pool=2),
        changed(folder, pool=2, pooling="pixel_shuffle"),
        changed(folder, tokens="cls_patch"),
    ]
    for file, change in (
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("preprocessor_config.json", lambda data: data.replace(b"0.5", b"0.4")),
        ("config.json", lambda data: data + b"\n"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / file))
        (copy / file).write_bytes(change((copy / file).read_bytes()))
        others.append(changed(copy))
    nested = Path(shutil.copytree(folder, tmp_path / "nested"))
    settings = json.loads((nested / "preprocessor_config.json").read_text())
    (nested / "processor_config.json").write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert changed(nested) == plain
    (nested / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    others.append(changed(nested))
    texts = [json.dumps(value, sort_keys=True) for value in (plain, *others)]
    assert len(set(texts)) == len(texts)


def to_open_clip(folder: Path, out: Path, name: str = "tiny", quick_gelu: bool = True) -> Path:
    """The vision tower of a saved CLIP, as an open_clip model with a random text tower."""
    import open_clip
    from safetensors.torch import save_file
    from transformers import CLIPVisionModel

    config = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": 32,
            "layers": 3,
            "width": 24,
            "head_width": 12,
            "patch_size": 8,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 12, "heads": 2, "layers": 1},
    }
    out.mkdir(exist_ok=True)
    model = open_clip.CLIP(**config)
    theirs = {
        key.removeprefix("vision_model."): value
        for key, value in CLIPVisionModel.from_pretrained(folder).state_dict().items()
    }
    ours = model.state_dict()
    ours["visual.class_embedding"] = theirs["embeddings.class_embedding"]
    ours["visual.conv1.weight"] = theirs["embeddings.patch_embedding.weight"]
    ours["visual.positional_embedding"] = theirs["embeddings.position_embedding.weight"]
    for part in ("weight", "bias"):
        ours[f"visual.ln_pre.{part}"] = theirs[f"pre_layrnorm.{part}"]
        for block in range(3):
            to, of = f"visual.transformer.resblocks.{block}", f"encoder.layers.{block}"
            ours[f"{to}.attn.in_proj_{part}"] = torch.cat(
                [theirs[f"{of}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            )
            for mine, their in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                ours[f"{to}.{mine}.{part}"] = theirs[f"{of}.{their}.{part}"]
    save_file({key: value.contiguous() for key, value in ours.items()}, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    (out / "architectures").mkdir(exist_ok=True)
    (out / "architectures" / f"{name}.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def clip_and_open(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("same")
    folder = save(clip, root / "clip")
    return folder, to_open_clip(folder, root / "open")


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("tokens", ["patch", "cls_patch"])
@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_open_clip_agrees_with_transformers_on_the_same_weights(
    clip_and_open: tuple[Path, Path], layer: int, tokens: str, resize: str
) -> None:
    folder, opened = clip_and_open
    options: dict[str, Any] = {"layer": layer, "tokens": tokens, "resize": resize}
    # Where an odd number of pixels is cropped, torchvision and transformers differ in which side loses more.
    images = [Image.open(io.BytesIO(picture(seed, (96, 64)))) for seed in range(2)]
    theirs = encode(Transformers(path=folder, **options).load("cpu", "float32"), images)
    encoder = OpenClip(model=f"local-dir:{opened}", **options).load("cpu", "float32")
    ours = encode(encoder, images)
    assert ours.shape == (2, encoder.patches, encoder.d_vision)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_open_clip_runs_no_block_after_the_layer(
    clip_and_open: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip.transformer import ResidualAttentionBlock as Block

    forward, ran = Block.forward, []
    monkeypatch.setattr(
        Block, "forward", lambda self, *args, **words: ran.append(1) or forward(self, *args, **words)
    )
    encoder = OpenClip(model=f"local-dir:{clip_and_open[1]}").load("cpu", "float32")
    encode(encoder, pictures())
    assert len(ran) == 2
    assert len(encoder._visual.transformer.resblocks) == 2  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="layer = -4: the model has only 3 blocks"):
        OpenClip(model=f"local-dir:{clip_and_open[1]}", layer=-4).load("cpu", "float32")


def test_open_clip_with_configs_and_a_file(clip_and_open: tuple[Path, Path], tmp_path: Path) -> None:
    _, opened = clip_and_open
    wanted = encode(OpenClip(model=f"local-dir:{opened}", pool=2).load("cpu", "float32"), pictures())
    weights = Path(shutil.copy(opened / "open_clip_model.safetensors", tmp_path / "mine.safetensors"))
    for form in ("safetensors", "pt"):
        if form == "pt":
            from safetensors.torch import load_file

            state, weights = load_file(weights), tmp_path / "mine.pt"
            torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, weights)
        options = OpenClip(model="tiny", pretrained=str(weights), configs=opened / "architectures", pool=2)
        encoder = options.load("cpu", "float32")
        assert (encoder.patches, encoder.d_vision) == (4, 24)
        assert torch.equal(encode(encoder, pictures()), wanted)
        assert options.identity()["files"].keys() == {weights.name}


def test_open_clip_takes_towers_of_timm(tmp_path: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 224}
    text = {"context_length": 8, "vocab_size": 20, "width": 12, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(16, vision, text).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing})
    )
    options = OpenClip(model=f"local-dir:{tmp_path}", tokens="cls_patch")
    encoder = options.load("cpu", "float32")
    assert (encoder.patches, encoder.d_vision) == (197, 192)
    seen: list[torch.Tensor] = []
    model.visual.trunk.blocks[-2].register_forward_hook(lambda block, given, output: seen.append(output))
    transform = open_clip.image_transform(224, False, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    with torch.no_grad():
        model.visual(torch.stack([transform(image) for image in pictures()]))
    torch.testing.assert_close(encode(encoder, pictures()), seen[0], rtol=0, atol=1e-5)
    assert options.identity()["preprocessing"]["resize_mode"] == "squash"


@pytest.mark.parametrize(
    ("trunk", "pool", "text"),
    [
        # BiomedCLIP: its text tower is one of Hugging Face's, which nobody here has.
        (
            "vit_tiny_patch16_224",
            "",
            {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT", "context_length": 256},
        ),
        # MedSigLIP's shape: no CLS token, a head that pools by attention.
        (
            "vit_base_patch16_siglip_224",
            "map",
            {"context_length": 8, "vocab_size": 20, "width": 12, "heads": 2},
        ),
    ],
)
def test_open_clip_needs_no_text_tower(
    trunk: str, pool: str, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip.model import CLIPVisionCfg
    from open_clip.timm_model import TimmModel
    from safetensors.torch import save_file

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vision = {"timm_model_name": trunk, "timm_pool": pool, "timm_proj": "linear", "image_size": 224}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"layers": 1} | text, "custom_text": True}
    torch.manual_seed(0)
    assert set(vision) <= set(CLIPVisionCfg.__dataclass_fields__)
    own = TimmModel(trunk, embed_dim=16, image_size=224, pool=pool, proj="linear").eval()
    state = {f"visual.{name}": value.contiguous() for name, value in own.state_dict().items()}
    if "hf_model_name" in text:
        state["text.transformer.embeddings.weight"] = torch.ones(3, 2)
    else:
        import open_clip

        whole = open_clip.CustomTextCLIP(16, vision, config["text_cfg"])
        state |= {name: value for name, value in whole.state_dict().items() if not name.startswith("visual.")}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    options = OpenClip(model=f"local-dir:{tmp_path}")
    encoder = options.load("cpu", "float32")
    seen: list[torch.Tensor] = []
    own.trunk.blocks[-2].register_forward_hook(lambda block, given, output: seen.append(output))
    pixels = torch.from_numpy(np.stack([encoder.preprocess(image) for image in pictures()]))
    with torch.no_grad():
        own(pixels)
    wanted = seen[0][:, own.trunk.num_prefix_tokens :]
    torch.testing.assert_close(encoder.encode(pixels), wanted, rtol=0, atol=1e-5)
    shapes = options.load("meta", "float32")
    assert (shapes.patches, shapes.d_vision) == (196, wanted.shape[2])
    state["visual.trunk.norm.more"] = torch.ones(1)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        options.load("cpu", "float32")


def test_open_clip_refuses_what_has_no_patches(tmp_path: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 12, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    save_file(open_clip.CLIP(16, vision, text).state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError, match="no vision transformer over a square grid"):
        OpenClip(model=f"local-dir:{tmp_path}").load("cpu", "float32")


def test_quick_gelu_mismatch_is_refused(
    clip_and_open: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    def never(*words: Any, **more: Any) -> None:
        raise AssertionError("it must not download")

    monkeypatch.setattr(open_clip, "download_pretrained", never)
    with pytest.raises(
        UserError, match=r"computes with GELU, but the tag 'openai' .* set model = 'ViT-L-14-336-quickgelu'"
    ):
        OpenClip(model="ViT-L-14-336", pretrained="openai").identity()
    with pytest.raises(UserError, match=r"computes with QuickGELU, but the tag .* set model = 'ViT-B-32'"):
        OpenClip(model="ViT-B-32-quickgelu", pretrained="laion2b_s34b_b79k").identity()
    folder, opened = clip_and_open
    quick = opened / "open_clip_model.safetensors"
    plain = to_open_clip(folder, tmp_path / "plain", "plain", quick_gelu=False)
    with pytest.raises(
        UserError, match=r"'plain': computes with GELU, .* set quick_gelu = true in the configuration"
    ):
        OpenClip(model="plain", pretrained=str(quick), configs=plain / "architectures").identity()
    shutil.copy(opened / "architectures/tiny.json", plain / "architectures/plain-quickgelu.json")
    with pytest.raises(UserError, match="set model = 'plain-quickgelu'"):
        OpenClip(model="plain", pretrained=str(quick), configs=plain / "architectures").identity()
    with pytest.raises(UserError, match=r"computes with QuickGELU, .* set model = 'plain'"):
        OpenClip(
            model="plain-quickgelu",
            pretrained=str(plain / "open_clip_model.safetensors"),
            configs=plain / "architectures",
        ).identity()


def test_a_lone_file_is_prepared_as_its_architecture_was_trained(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"any")
    prepared = OpenClip(model="ViT-B-16-SigLIP", pretrained=str(weights)).identity()["preprocessing"]
    assert prepared["mean"] == [0.5, 0.5, 0.5]
    assert prepared["resize_mode"] == "squash"
    prepared = OpenClip(model="ViT-L-14-336-quickgelu", pretrained=str(weights)).identity()["preprocessing"]
    assert prepared["mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert (prepared["size"], prepared["resize_mode"]) == (336, "shortest")
    with pytest.raises(UserError, match=r"weights of ViT-L-14 differ in how .* put their repository's"):
        OpenClip(model="ViT-L-14", pretrained=str(weights)).identity()
    (tmp_path / "open_clip_config.json").write_text(
        '{"model_cfg": {}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}'
    )
    prepared = OpenClip(model="ViT-L-14", pretrained=str(weights)).identity()["preprocessing"]
    assert prepared["mean"] == [0.1, 0.2, 0.3]


def test_identity_of_open_clip_holds_what_decides_features(
    clip_and_open: tuple[Path, Path], tmp_path: Path
) -> None:
    opened = clip_and_open[1]

    def identity(folder: Path = opened, **options: Any) -> str:
        return json.dumps(OpenClip(model=f"local-dir:{folder}", **options).identity(), sort_keys=True)

    moved = Path(shutil.copytree(opened, tmp_path / "moved"))
    assert identity(moved) == identity()
    found = {identity(), identity(layer=-1), identity(resize="pad"), identity(pool=2)}
    found.add(identity(pool=2, pooling="pixel_shuffle"))
    settings = json.loads((moved / "open_clip_config.json").read_text())
    for part, key, value in (("preprocess_cfg", "mean", [0.5] * 3), ("model_cfg", "quick_gelu", False)):
        new = settings | {part: settings[part] | {key: value}}
        (moved / "open_clip_config.json").write_text(json.dumps(new))
        found.add(identity(moved))
    weights = moved / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found.add(identity(moved))
    assert len(found) == 8


def test_open_clip_from_the_hubs_cache(
    clip_and_open: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--clinic--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(clip_and_open[1], repository / "snapshots" / ("0" * 40))
    options, local = OpenClip(model="hf-hub:clinic/tiny"), OpenClip(model=f"local-dir:{clip_and_open[1]}")
    assert options.identity() == local.identity()
    features = encode(options.load("cpu", "float32"), pictures())
    assert torch.equal(features, encode(local.load("cpu", "float32"), pictures()))
    with pytest.raises(
        UserError, match=r"'hf-hub:clinic/huge': cannot be downloaded: .*use 'local-dir:/path'"
    ):
        OpenClip(model="hf-hub:clinic/huge").identity()


def test_mistakes_with_open_clip_are_named(clip_and_open: tuple[Path, Path], tmp_path: Path) -> None:
    opened = clip_and_open[1]
    tiny = opened / "architectures"
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"")
    (other / "open_clip_config.json").write_text('{"model_cfg": {}}')
    for options, message in (
        (
            {"model": "ViT-L-14-337", "pretrained": "openai"},
            "no such architecture; did you mean 'ViT-L-14-336'",
        ),
        ({"model": "ViT-L-14-336"}, "'pretrained' is missing"),
        (
            {"model": "ViT-L-14-336", "pretrained": "opnai"},
            "neither a file nor a tag of ViT-L-14-336; tags: openai",
        ),
        ({"model": "tiny", "pretrained": "x", "configs": tmp_path / "none"}, "none: no such directory"),
        ({"model": f"local-dir:{tmp_path}"}, "has no open_clip_config.json with weights"),
        ({"model": f"local-dir:{other}"}, r"lacks model_cfg\.vision_cfg\.image_size"),
        ({"model": f"local-dir:{opened}", "pretrained": "openai"}, "remove 'pretrained' and 'configs'"),
        (
            {"model": "tiny", "pretrained": str(tmp_path / "broken.pt"), "configs": tiny},
            "model = 'tiny': cannot be loaded",
        ),
    ):
        with pytest.raises(UserError, match=message):
            OpenClip(**options).load("cpu", "float32")
    with pytest.raises(ValidationError):
        OpenClip(model="tiny", resize="stretch")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "install the torchvision made for this torch",
        ),
        (ImportError("No module named 'torchvision'"), "install the torchvision made for this torch"),
        (ImportError("No module named 'open_clip'"), r"pip install 'open_clip_torch>=3\.0'"),
    ],
)
def test_a_broken_torchvision_is_one_clear_error(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def fail(name: str, *words: Any, **more: Any) -> Any:
        if name == "open_clip":
            raise error
        return real(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", fail)
    options = ENCODERS.build(Component(name="open_clip", model="ViT-B-32"), "extract.encoder")
    with pytest.raises(UserError, match=message) as raised:
        options.identity()
    assert str(error) in str(raised.value)
    with pytest.raises(UserError, match=message):
        options.load("cpu", "float32")


def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoImageProcessor

    def fail(*words: Any, **more: Any) -> None:
        raise ValueError("DINOv3ViTImageProcessor requires the Torchvision library: torchvision is missing")

    folder = save(dinov3, tmp_path)
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot be loaded: .*install the torchvision made for this torch"):
        Transformers(path=folder).load("cpu", "float32")


def experiment(root: Path, encoder: str, llama_dir: Path) -> Path:
    write_llava(root, 7)
    path = root / "one.toml"
    path.write_text(
        f'experiment = "one"\nfeatures = "{root}/features"\nbuild = "{root}/build"\n'
        f"[extract]\nshard_images = 4\nbatch_size = 3\nencoder = {encoder}\n[extract.silos]\n"
        f'one = {{ name = "llava_json", path = "{root}/pairs.json", images = "{root}" }}\n'
        f'[language]\npath = "{llama_dir}"\n[federate]\nsilos = ["one"]\n'
    )
    return path


@pytest.mark.parametrize("library", ["siglip", "open_clip"])
def test_extraction_into_a_cache(
    library: str, tmp_path: Path, llama_dir: Path, clip_and_open: tuple[Path, Path]
) -> None:
    if library == "siglip":
        folder = save(siglip, tmp_path / "model")
        encoder: Any = Transformers(path=folder, resize="pad", pool=2, pooling="pixel_shuffle")
        words = (
            f'{{ name = "transformers", path = "{folder}", resize = "pad", pool = 2, '
            'pooling = "pixel_shuffle" }'
        )
        shape = (4, 96)
    else:
        folder = clip_and_open[1]
        encoder = OpenClip(
            model="tiny",
            pretrained=str(folder / "open_clip_model.safetensors"),
            configs=folder / "architectures",
        )
        words = (
            f'{{ name = "open_clip", model = "tiny", pretrained = "{encoder.pretrained}", '
            f'configs = "{encoder.configs}" }}'
        )
        shape = (16, 24)
    path = experiment(tmp_path, words, llama_dir)
    result = CliRunner().invoke(main, ["extract", str(path)])
    assert result.exit_code == 0, result.output
    cache = FeatureCache(tmp_path / "features/one.zarr")
    assert (cache.images, cache.manifest["key"]["encoder"]) == (7, encoder.identity())
    images = [Image.open(tmp_path / f"scans/{seed:03d}.png").convert("RGB") for seed in (2, 6)]
    wanted = encode(encoder.load("cpu", "float32"), images)
    assert wanted.shape[1:] == shape
    torch.testing.assert_close(cache.tensor([2, 6]).float(), wanted, rtol=1e-2, atol=1e-2)
    assert "Nothing to do" in CliRunner().invoke(main, ["extract", str(path)]).output
    refused = CliRunner().invoke(main, ["extract", str(path), "--set", "extract.encoder.resize=squash"])
    assert refused.exit_code == 2
    assert 'encoder.resize: "squash" here' in refused.output


def test_caches_from_before_these_options_stay_valid(clip_dir: Path) -> None:
    """The identity that the first version wrote, whose pictures were neither turned nor put on white."""
    from fedcmp.pipeline.models.saved_model import model_hashes

    older = {"pool": 2, "orientation": "as_stored", "transparency": "ignored"}
    assert Transformers(path=clip_dir, **older).identity() == {
        "name": "transformers",
        "files": model_hashes(clip_dir, ["preprocessor_config.json"]),
        "layer": -2,
        "tokens": "patch",
        "pool": 2,
    }
