from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT, digest, picture, write_llava, write_shard
from PIL import Image

from fedcmp.cli import main
from fedcmp.extract.encoders.transformers import Transformers
from fedcmp.pipeline.cache import FeatureCache, partial_path
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.records import Record


def config(root: Path, clip_dir: Path, llama_dir: Path, source: str, more: str = "") -> Path:
    path = root / "one.toml"
    path.write_text(
        f'experiment = "one"\nfeatures = "{root}/features"\nbuild = "{root}/build"\n'
        f'[extract]\nshard_images = 4\nbatch_size = 3\n{more}\n[extract.encoder]\nname = "transformers"\n'
        f'path = "{clip_dir}"\n[extract.silos]\none = {source}\n[language]\npath = "{llama_dir}"\n'
        '[federate]\nsilos = ["one"]\n'
    )
    return path


def run(path: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["extract", str(path), *words])


@pytest.mark.parametrize(
    ("layer", "tokens", "pool"), [(-2, "patch", 1), (-1, "cls_patch", 1), (-2, "patch", 2)]
)
def test_features_are_transformers_own(clip_dir: Path, layer: int, tokens: str, pool: int) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModel

    options = Transformers(path=clip_dir, layer=layer, tokens=tokens, pool=pool)
    encoder = options.load("cpu", "float32")
    images = [Image.open(io.BytesIO(picture(seed))) for seed in range(3)]
    features = encoder.encode(torch.from_numpy(np.stack([encoder.preprocess(image) for image in images])))
    processor = AutoImageProcessor.from_pretrained(clip_dir, backend="pil")
    model = CLIPVisionModel.from_pretrained(clip_dir).eval()
    with torch.no_grad():
        states = model(**processor(images, return_tensors="pt"), output_hidden_states=True).hidden_states
    wanted = states[layer]
    if tokens == "patch":
        wanted = wanted[:, 1:]
    if pool == 2:
        grid = wanted.transpose(1, 2).unflatten(2, (4, 4))
        wanted = torch.nn.functional.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    assert features.shape == (3, encoder.patches, encoder.d_vision)
    torch.testing.assert_close(features, wanted, rtol=0, atol=1e-5)


def test_unfit_encoder_options_are_named(clip_dir: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"path": clip_dir, "layer": -9}, "layer = -9: the model has only 3 blocks"),
        ({"path": clip_dir, "pool": 3}, "pool = 3"),
    ):
        with pytest.raises(UserError, match=message):
            Transformers(**options).load("cpu", "float32")
    with pytest.raises(UserError, match=r"no config\.json with weights; give the directory"):
        Transformers(path=tmp_path / "none").identity()
    with pytest.raises(UserError, match=r"no config\.json with weights; give the directory"):
        Transformers(path=tmp_path).identity()


def test_a_cache_holds_what_the_encoder_gives(extracted: Path, clip_dir: Path) -> None:
    encoder = Transformers(path=clip_dir, pool=2).load("cpu", "float32")
    for silo, images in (("clinic", 20), ("lab", 18), ("heldout", 12)):
        cache = FeatureCache(extracted.parent / "features" / f"{silo}.zarr")
        assert cache.images == images
        assert cache.texts == images
        row = 5
        seed = {"clinic": 0, "lab": 100, "heldout": 500}[silo] + row
        form = "jpeg" if silo == "lab" else "png"
        pixels = encoder.preprocess(Image.open(io.BytesIO(picture(seed, form=form))))
        expected = encoder.encode(torch.from_numpy(pixels)[None]).bfloat16()
        torch.testing.assert_close(cache.tensor([row]), expected, rtol=2e-2, atol=2e-2)


def test_a_second_run_does_nothing_and_says_so(extracted: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in extracted.parent.rglob("*.json")}
    result = run(extracted)
    assert result.exit_code == 0
    assert "Nothing to do" in result.output
    assert before == {file: file.stat().st_mtime_ns for file in extracted.parent.rglob("*.json")}


def test_bad_images_are_counted_listed_and_skipped(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    path = write_llava(tmp_path, 9)
    scans = tmp_path / "scans"
    whole = (scans / "001.png").read_bytes()
    (scans / "001.png").write_bytes(whole[: len(whole) // 2])
    (scans / "003.png").write_bytes(b"not a picture")
    (scans / "005.png").unlink()
    (scans / "007.png").write_bytes(b"")
    Image.new("L", (40, 90), 128).save(scans / "002.png")
    Image.new("RGBA", (3, 1), (1, 2, 3, 4)).save(scans / "004.png")
    source = f'{{ name = "llava_json", path = "{path}", images = "{tmp_path}" }}'
    result = run(config(tmp_path, clip_dir, llama_dir, source))
    assert result.exit_code == 0, result.output
    assert "skipped scans/001.png: unreadable" in result.output
    cache = FeatureCache(tmp_path / "features" / "one.zarr")
    failures = {item["id"]: item["status"] for item in cache.manifest["failures"]}
    assert failures == {
        "scans/001.png": "unreadable",
        "scans/003.png": "unreadable",
        "scans/005.png": "missing",
        "scans/007.png": "unreadable",
    }
    assert cache.status.tolist() == [0, 2, 0, 2, 0, 1, 0, 2, 0]
    assert not cache.read([1, 3, 5, 7]).any()
    assert cache.read([0, 2, 4, 6, 8]).any(axis=(1, 2)).all()
    assert cache.text_image[cache.usable_texts("train")].tolist() == [0, 2, 4, 6, 8]


def test_sixteen_bit_pictures_are_not_white(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    write_llava(tmp_path, 4)
    ramp = np.linspace(0, 0xFFFF, 40 * 50).reshape(40, 50).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "scans/000.png")
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "scans/001.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "scans/002.png", format="tiff")
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    assert run(config(tmp_path, clip_dir, llama_dir, source)).exit_code == 0
    cache = FeatureCache(tmp_path / "features/one.zarr")
    assert cache.status.tolist() == [0, 0, 2, 0]
    assert (cache.read([0]) == cache.read([1])).all()
    assert "floating-point" in cache.manifest["failures"][0]["reason"]


def test_damaged_or_foreign_models_are_one_line(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    write_llava(tmp_path, 2)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    damaged = tmp_path / "damaged"
    shutil.copytree(clip_dir, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for model, message in ((damaged, "cannot be loaded"), (llama_dir, "a model of type 'llama'")):
        result = run(config(tmp_path, model, llama_dir, source))
        assert result.exit_code == 2
        assert f"extract.encoder.path = {model}: {message}" in " ".join(result.output.split())
    small = tmp_path / "small"
    shutil.copytree(clip_dir, small)
    processor = small / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("32", "24"))
    result = run(config(tmp_path, small, llama_dir, source))
    assert result.exit_code == 2
    assert "set crop_size in preprocessor_config.json" in result.output


def test_compute_dtype_is_in_the_key(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    write_llava(tmp_path, 2)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    path = config(tmp_path, clip_dir, llama_dir, source)
    assert run(path).exit_code == 0
    assert "Nothing to do" in run(path, "--set", "extract.compute_dtype=float32").output
    result = run(path, "--set", "extract.compute_dtype=bfloat16")
    assert 'compute_dtype: "bfloat16" here, "float32" there' in result.output


def test_a_mistyped_path_is_named(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    source = f'{{ name = "llava_json", path = "{tmp_path}/nowhere.json", images = "{tmp_path}" }}'
    result = run(config(tmp_path, clip_dir, llama_dir, source))
    assert result.exit_code == 2
    assert "nowhere.json: no such file; set 'path'" in result.output


def test_features_that_overflow_are_not_finite(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModel

    broken = tmp_path / "broken"
    model = CLIPVisionModel.from_pretrained(clip_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e4)
    model.save_pretrained(broken)
    AutoImageProcessor.from_pretrained(clip_dir, backend="pil").save_pretrained(broken)
    write_llava(tmp_path, 3)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    result = run(config(tmp_path, broken, llama_dir, source, 'dtype = "float16"'))
    assert result.exit_code == 2
    assert "not one image could be read" in result.output


def test_nothing_readable_is_an_error(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "png": b"no", "txt": b"words"}])
    path = config(tmp_path, clip_dir, llama_dir, f'{{ name = "webdataset", path = "{tmp_path}/0.tar" }}')
    result = run(path)
    assert result.exit_code == 2
    assert "not one image could be read" in result.output
    assert "a.png" in result.output


def test_another_encoder_is_refused_until_overwritten(
    tmp_path: Path, clip_dir: Path, llama_dir: Path
) -> None:
    write_llava(tmp_path, 5)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    path = config(tmp_path, clip_dir, llama_dir, source)
    assert run(path).exit_code == 0
    refused = run(path, "--set", "extract.encoder.layer=-1")
    assert refused.exit_code == 2
    assert "encoder.layer: -1 here, -2 there" in refused.output
    assert "--overwrite" in refused.output
    assert FeatureCache(tmp_path / "features/one.zarr").manifest["key"]["encoder"]["layer"] == -2
    assert run(path, "--set", "extract.encoder.layer=-1", "--overwrite").exit_code == 0
    assert FeatureCache(tmp_path / "features/one.zarr").manifest["key"]["encoder"]["layer"] == -1


def test_a_damaged_cache_is_encoded_again(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    write_llava(tmp_path, 5)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    path = config(tmp_path, clip_dir, llama_dir, source)
    assert run(path).exit_code == 0
    whole = digest(tmp_path / "features")
    shard = tmp_path / "features/one.zarr/features/patch/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(path).exit_code == 0
    assert digest(tmp_path / "features") == whole
    flipped = bytearray(shard.read_bytes())
    flipped[7] ^= 1
    shard.write_bytes(flipped)
    assert run(path, "--overwrite").exit_code == 0
    assert digest(tmp_path / "features") == whole


@pytest.mark.parametrize("content", ["{}", "{broken"])
def test_a_foreign_manifest_is_one_line(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, content: str
) -> None:
    write_llava(tmp_path, 5)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    path = config(tmp_path, clip_dir, llama_dir, source)
    assert run(path).exit_code == 0
    (tmp_path / "features/one.zarr/manifest.json").write_text(content)
    result = run(path)
    assert result.exit_code == 2
    assert "--overwrite" in result.output or "delete it and run again" in result.output


def test_new_images_are_encoded(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    write_llava(tmp_path, 5)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    path = config(tmp_path, clip_dir, llama_dir, source)
    assert run(path).exit_code == 0
    write_llava(tmp_path, 7)
    result = run(path)
    assert result.exit_code == 0
    assert "extracted" in result.output
    assert FeatureCache(tmp_path / "features/one.zarr").images == 7


def test_decoding_beside_a_gpu_gives_the_bytes_of_decoding_between_batches(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcmp.extract import silo

    write_llava(tmp_path, 11)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    sent, before, encode = [], [], silo._encode

    class Pool(ThreadPoolExecutor):
        def submit(self, *args: Any, **words: Any) -> Future[Any]:
            sent.append(args)
            return super().submit(*args, **words)

    monkeypatch.setattr(silo, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(silo, "_encode", lambda *args: before.append(len(sent)) or encode(*args))
    for kind in ("cpu", "cuda"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(silo, "device_type", lambda _, kind=kind: kind)
        result = run(config(tmp_path / kind, clip_dir, llama_dir, source))
        assert result.exit_code == 0, result.output
    # Shards of 4, 4 and 3 pictures, batches of 3: how many were decoded, or being decoded, at each encoding.
    assert before == [3, 4, 7, 8, 11, 11 + 4, 11 + 4, 11 + 8, 11 + 8, 11 + 11]
    assert digest(tmp_path / "cpu/features") == digest(tmp_path / "cuda/features")


def test_killed_and_rerun_gives_the_same_bytes(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    """`kill -9` as soon as a few shards are finished; the rerun takes them over."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_llava(tmp_path, 400)
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    whole = config(tmp_path / "a", clip_dir, llama_dir, source)
    assert run(whole).exit_code == 0
    path = config(tmp_path / "b", clip_dir, llama_dir, source)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedcmp", "extract", str(path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    done = partial_path(tmp_path / "b/features/one.zarr") / "_done"
    deadline = time.monotonic() + 60
    while len(list(done.glob("0*.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b/features/one.zarr").exists()
    refused = run(path, "--set", "extract.encoder.layer=-1")
    assert refused.exit_code == 2
    assert "encoder.layer: -1 here, -2 there" in refused.output
    result = run(path)
    assert result.exit_code == 0, result.output
    assert "resumed at shard" in result.output
    assert digest(tmp_path / "a/features") == digest(tmp_path / "b/features")


def test_int8_features_are_near_and_say_how_near(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    write_llava(tmp_path, 12)
    (tmp_path / "scans/004.png").write_bytes(b"no picture")
    source = f'{{ name = "llava_json", path = "{tmp_path}/pairs.json", images = "{tmp_path}" }}'
    exact = config(tmp_path, clip_dir, llama_dir, source, 'dtype = "float32"')
    assert run(exact).exit_code == 0
    reference = FeatureCache(tmp_path / "features/one.zarr")
    refused = run(config(tmp_path, clip_dir, llama_dir, source, 'dtype = "int8"'))
    assert 'dtype: "int8" here, "float32" there' in refused.output
    path = config(tmp_path, clip_dir, llama_dir, source, 'dtype = "int8"')
    path.write_text(path.read_text().replace("/features", "/small"))
    assert run(path).exit_code == 0, run(path).output
    cache = FeatureCache(tmp_path / "small/one.zarr")
    usable = [row for row in range(12) if row != 4]
    ours, theirs = cache.tensor(usable), reference.tensor(usable)
    measured = float((ours - theirs).norm() / theirs.norm())
    assert measured == pytest.approx(cache.manifest["int8"]["relative_error"], rel=1e-2)
    assert measured < 0.02
    assert not cache.read([4]).any()
    assert cache.manifest["dtype"] == cache.manifest["key"]["dtype"] == "int8"
    whole = digest(tmp_path / "small/one.zarr")
    shutil.rmtree(tmp_path / "small")
    for worker in ("1/2", "0/2"):
        assert run(path, "--worker", worker).exit_code == 0
    assert digest(tmp_path / "small/one.zarr") == whole


def test_a_failing_disk_leaves_no_hole(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workplace / "experiment.toml"
    words = ["extract", str(config), "--silo", "clinic", "--set", f"features={tmp_path}"]
    read = Record.read_image

    def failing(record: Record) -> bytes:
        if record.id.endswith("011.png"):
            raise OSError(errno.EIO, "Input/output error")
        return read(record)

    monkeypatch.setattr(Record, "read_image", failing)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "011.png: cannot be read ([Errno 5] Input/output error); fix that and rerun" in result.output
    assert not (tmp_path / "clinic.zarr").exists()
    monkeypatch.setattr(Record, "read_image", read)
    assert CliRunner().invoke(main, words).exit_code == 0
    assert FeatureCache(tmp_path / "clinic.zarr").manifest["failures"] == []


def test_a_benchmark_takes_no_silos_place(workplace: Path) -> None:
    words = ["extract", str(workplace / "experiment.toml"), "--benchmark", "clinic", "--images", "x"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "--benchmark clinic: a silo has this name, too" in result.output
