"""Pictures that could be read as something else than a person sees, and pictures too long for memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, picture
from PIL import Image, ImageOps
from test_encoders import clip, dinov2, save, to_open_clip
from test_extract import config, run

from fedcmp.extract.encoders import crop
from fedcmp.extract.encoders.open_clip import OpenClip
from fedcmp.extract.encoders.patches import LoadedPatchEncoder
from fedcmp.extract.encoders.transformers import Transformers
from fedcmp.extract.pictures import Reading, read_rgb
from fedcmp.pipeline.cache import FeatureCache

BASE = Image.open(io.BytesIO(picture(3, (40, 30)))).convert("RGB")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95} if form == "JPEG" else {}
    return encoded(BASE, form, exif=exif, **options)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_or_not_and_counted(form: str, orientation: int) -> None:
    data = turned(orientation, form)
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    stored, notes = read_rgb(data, Reading(orientation="as_stored"))
    itself = form == "TIFF"  # Pillow turns them when it loads them
    if not itself:
        assert stored.tobytes() == plain.tobytes()
        assert notes == (("orientation",) if orientation > 1 else ())
    applied, notes = read_rgb(data, Reading())
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert applied.size == seen.size
    assert applied.tobytes() == seen.tobytes()
    if not itself:
        assert notes == (("turned",) if orientation > 1 else ())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_harms_no_picture() -> None:
    data = encoded(BASE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_rgb(data, Reading())[0].size == BASE.size


def clear(mode: str) -> bytes:
    """The left half transparent, black below."""
    pixels = np.array(BASE.convert("RGBA"))
    pixels[:, :20] = 0
    image = Image.fromarray(pixels)
    if mode == "P":
        palette = BASE.quantize(16)
        palette.paste(0, (0, 0, 20, 30))
        return encoded(palette, "PNG", transparency=0)
    if mode == "RGB":
        return encoded(image.convert("RGB"), "PNG", transparency=(0, 0, 0))
    return encoded(image.convert(mode), "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_parts_are_white_or_not_and_counted(mode: str) -> None:
    data = clear(mode)
    ignored, notes = read_rgb(data, Reading(transparency="ignored"))
    assert notes == ("transparent",)
    assert ignored.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    white, notes = read_rgb(data, Reading())
    assert notes == ("on_white",)
    assert (np.asarray(white)[:, :20] == 255).all()
    assert (np.asarray(white)[:, 20:] == np.asarray(ignored)[:, 20:]).any(axis=(0, 1)).all()


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("frames", [1, 3])
def test_further_frames_are_counted(form: str, frames: int) -> None:
    first, *others = [BASE, BASE.rotate(90).resize(BASE.size), BASE.rotate(180)][:frames]
    buffer = io.BytesIO()
    if others:
        first.save(buffer, form, save_all=True, append_images=others)
    else:
        first.save(buffer, form)
    image, notes = read_rgb(buffer.getvalue(), Reading())
    assert image.size == BASE.size
    assert notes == (("frames",) if frames > 1 else ())


@pytest.mark.parametrize("reading", [Reading(), Reading("as_stored", "ignored")])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_ordinary_pictures_stay_what_they_were(mode: str, reading: Reading) -> None:
    data = encoded(BASE.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    image, notes = read_rgb(data, reading)
    assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    assert notes == ()


GREY = np.asarray(BASE.convert("L")).astype(np.uint16)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_few_bits_in_sixteen_are_listed_unless_their_range_is_given(form: str, bits: int) -> None:
    white = (1 << bits) - 1
    pixels = (GREY.astype(int) * white // GREY.max()).astype(np.uint16)
    data = encoded(Image.fromarray(pixels), form)
    with pytest.raises(ValueError, match=f"brightest pixel is {white} of 65535.*white_level, to {white} "):
        read_rgb(data, Reading())
    image, _ = read_rgb(data, Reading(white_level=white))
    assert (np.asarray(image)[..., 0] == pixels >> (bits - 8)).all()
    dark, _ = read_rgb(data, Reading(white_level=65535))
    assert (np.asarray(dark)[..., 0] == pixels >> 8).all()
    with pytest.raises(ValueError, match=r"raise extract\.encoder\.white_level"):
        read_rgb(data, Reading(white_level=white - 1))


def test_sixteen_bits_of_full_range_are_as_before() -> None:
    for pixels in (GREY * 257, np.zeros((9, 9), np.uint16)):
        image, _ = read_rgb(encoded(Image.fromarray(pixels), "PNG"), Reading())
        assert (np.asarray(image)[..., 0] == pixels >> 8).all()


def sixteen_bit_colours(white: int) -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads and cannot write."""
    import struct
    import zlib

    pixels = (np.asarray(BASE).astype(int) * white // 255).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *BASE.size, 16, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_few_bits_in_sixteen_of_colours_are_listed() -> None:
    full, _ = read_rgb(sixteen_bit_colours(65535), Reading())
    assert np.abs(np.asarray(full).astype(int) - np.asarray(BASE)).max() <= 1
    with pytest.raises(ValueError, match="only the upper 8 are read; they reach 15 of 255"):
        read_rgb(sixteen_bit_colours(4095), Reading())
    assert read_rgb(sixteen_bit_colours(4095), Reading(white_level=65535))


def test_notes_are_counted_in_manifest_and_summary(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(turned(6, "PNG") if number < 3 else clear("RGBA"))
    path = config(tmp_path, clip_dir, llama_dir, f'{{ name = "image_folder", path = "{folder}" }}')
    result = run(path)
    cache = FeatureCache(tmp_path / "features/one.zarr")
    assert cache.manifest["notes"] == {"on_white": 3, "turned": 3}
    assert "one: 3 pictures turned as their EXIF orientation says" in result.output
    assert "one: 3 pictures with transparent parts, put on white" in result.output
    changed = run(path, "--set", "extract.encoder.orientation=as_stored")
    assert changed.exit_code == 2
    assert "encoder.orientation: null here" in changed.output
    options = ["orientation=as_stored", "transparency=ignored"]
    words = [word for option in options for word in ("--set", f"extract.encoder.{option}")]
    again = run(path, "--overwrite", *words)
    assert again.exit_code == 0
    assert FeatureCache(cache.path).manifest["notes"] == {"orientation": 3, "transparent": 3}
    assert "an EXIF orientation, which is not applied; extract.encoder.orientation = 'exif'" in again.output


def test_defaults_written_out_are_the_same_key(clip_dir: Path) -> None:
    short = Transformers(path=clip_dir)
    written = Transformers(path=clip_dir, orientation="exif", transparency="white", white_level=None)
    assert short.identity() == written.identity()
    assert Transformers(path=clip_dir, white_level=4095).identity() == short.identity() | {
        "white_level": 4095
    }


def test_key_of_older_caches_means_what_they_were_made_with(clip_dir: Path) -> None:
    """Pictures were neither turned nor put on white, and the key named no such option."""
    older = Transformers(path=clip_dir, orientation="as_stored", transparency="ignored").identity()
    assert not {"orientation", "transparency"} & set(older)
    newer = Transformers(path=clip_dir).identity()
    assert newer == older | {"orientation": "exif", "transparency": "white"}


Maker = Callable[[Path], LoadedPatchEncoder]


def of_clip(folder: Path) -> Any:
    return Transformers(path=save(clip, folder)).load("cpu", "float32")


def of_dinov2(folder: Path) -> Any:
    return Transformers(path=save(dinov2, folder)).load("cpu", "float32")


def of_open_clip(folder: Path) -> Any:
    out = to_open_clip(save(clip, folder / "clip"), folder / "open")
    return OpenClip(model=f"local-dir:{out}").load("cpu", "float32")


def of_open_clip_bilinear(folder: Path) -> Any:
    out = to_open_clip(save(clip, folder / "clip"), folder / "open")
    settings = json.loads((out / "open_clip_config.json").read_text())
    settings["preprocess_cfg"] = {"interpolation": "bilinear"}
    (out / "open_clip_config.json").write_text(json.dumps(settings))
    return OpenClip(model=f"local-dir:{out}").load("cpu", "float32")


ENCODERS = [of_clip, of_dinov2, of_open_clip, of_open_clip_bilinear]


@pytest.mark.parametrize("make", ENCODERS)
def test_elongated_pictures_have_the_same_pixels(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make(tmp_path)
    rng = np.random.default_rng(0)
    sides = [1, 2, 3, 7, 31, 32, 33, 40, 41, 99, 500]
    for width in sides:
        for height in sides:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            wanted = encoder.preprocess(image)
            with monkeypatch.context() as patch:
                patch.setattr(crop, "_LARGE", int(rng.integers(0, 5000)))
                assert encoder.preprocess(image).tobytes() == wanted.tobytes(), (width, height)


@pytest.mark.parametrize("size", [(6000, 1), (1, 1000)])
def test_thin_strips_take_little_memory(size: tuple[int, int], clip_dir: Path) -> None:
    """At CLIP's 336 pixels a strip would become 677 million of them."""
    code = f"""
import resource
from PIL import Image
from transformers import CLIPImageProcessorPil
from fedcmp.extract.encoders.transformers import _crop
crop = _crop(CLIPImageProcessorPil(size={{"shortest_edge": 336}}, crop_size={{"height": 336, "width": 336}}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = Image.new("RGB", {size}, (9, 99, 199))
assert crop.is_needed(image.size)
assert crop.centre(image).getextrema() == ((9, 9), (99, 99), (199, 199))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500


def test_what_is_too_elongated_is_listed(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (10_000_000, 1)).save(folder / "wide.png")
    Image.new("L", (1, 2_000_000)).save(folder / "tall.png")
    (folder / "usual.png").write_bytes(picture(0))
    path = config(tmp_path, clip_dir, llama_dir, f'{{ name = "image_folder", path = "{folder}" }}')
    assert run(path).exit_code == 0
    cache = FeatureCache(tmp_path / "features/one.zarr")
    reasons = {item["id"]: item["reason"] for item in cache.manifest["failures"]}
    assert reasons == {
        "wide.png": "ValueError: 10000000x1 pixels are too elongated to crop to a square",
        "tall.png": "ValueError: 1x2000000 pixels are too elongated to crop to a square",
    }
