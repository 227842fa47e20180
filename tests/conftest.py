"""Tiny random models of the real architectures, and silos of pictures that are not the world's."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests that take minutes run when asked for."""
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Tests run side by side, and so do the processes that they start: one thread each.

    What private runs have released is not written down in the home of whoever tests.
    """
    ledgers = tempfile.TemporaryDirectory(prefix="fedcmp-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(ledgers.cleanup)
    os.environ["XDG_DATA_HOME"] = ledgers.name
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# Minutes each. A worker that is given one of them last keeps all others waiting.
_LONGEST = ("flower", "make", "tour", "wheel", "gate", "ablate", "fuzz", "workers", "plugins")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)

    items.sort(key=place)


def picture(seed: int, size: tuple[int, int] = (70, 52), form: str = "png") -> bytes:
    """An encoded RGB picture of smooth random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size).save(buffer, form)
    return buffer.getvalue()


def digest(folder: Path) -> str:
    """Hash of every file's name and bytes, but for marks of verified caches, which hold times and inodes."""
    parts = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.endswith(".verified.json"):
            parts.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return parts.hexdigest()


CAPTIONS = (
    "Zwei Hunde auf der Wiese",
    "an X-ray of a left hand, anterior view",
    "quarterly revenue by région (in €)",
    "a dog's bowl & a cat",
)


def conversation(seed: int) -> dict:
    return {
        "id": f"case-{seed}",
        "image": f"scans/{seed:03d}.png",
        "conversations": [
            {"from": "human", "value": "Describe it.\n<image>"},
            {"from": "gpt", "value": f"{CAPTIONS[seed % 4]} {seed}"},
        ],
    }


def write_llava(folder: Path, number: int, first: int = 0) -> Path:
    """LLaVA JSON with an image folder."""
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    entries = [conversation(seed) for seed in range(first, first + number)]
    for seed, entry in enumerate(entries, first):
        (folder / entry["image"]).write_bytes(picture(seed))
    path = folder / "pairs.json"
    path.write_text(json.dumps(entries))
    return path


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    """A tar of samples; `__key__` names each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for suffix, data in sample.items():
                if suffix != "__key__":
                    info = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
        hidden_act="quick_gelu",
    )
    CLIPVisionModel(config).save_pretrained(out)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the world's tokenizer, which knows few of the words used here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedcmp.pipeline.world import models

    torch.manual_seed(1)
    out = tmp_path_factory.mktemp("llama")
    tokenizer = models.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, clip_dir: Path, llama_dir: Path) -> Path:
    """A folder with two training silos, a held-out one, benchmark files and an experiment file."""
    root = tmp_path_factory.mktemp("experiment")
    write_llava(root / "clinic", 20)
    for shard in range(2):
        samples = []
        for seed in range(100 + 9 * shard, 109 + 9 * shard):
            text = {"txt": CAPTIONS[seed % 4].encode()}
            if seed % 2:
                text = {"json": json.dumps(conversation(seed)).encode()}
            samples.append({"__key__": f"{seed:06d}", "jpg": picture(seed, form="jpeg"), **text})
        write_shard(root / "lab" / f"{shard:05d}.tar", samples)
    write_llava(root / "heldout", 12, first=500)
    (root / "pope.json").write_text(
        "".join(
            json.dumps(
                {
                    "question_id": number,
                    "image": f"scans/{500 + number // 2:03d}.png",
                    "text": "Is there a dog in the image?",
                    "label": ("yes", "no")[number % 2],
                }
            )
            + "\n"
            for number in range(24)
        )
    )
    (root / "captions.json").write_text(
        json.dumps(
            {
                "images": [{"id": n, "file_name": f"scans/{n}.png"} for n in range(500, 512)],
                "annotations": [
                    {"id": n, "image_id": n, "caption": CAPTIONS[n % 4]} for n in range(500, 512)
                ],
            }
        )
    )
    (root / "experiment.toml").write_text(
        f"""
experiment = "study"
features = "{root}/features"
build = "{root}/build"

[extract]
shard_images = 8
batch_size = 3
encoder = {{ name = "transformers", path = "{clip_dir}", pool = 2 }}

[extract.silos]
clinic = {{ name = "llava_json", path = "{root}/clinic/pairs.json", images = "{root}/clinic" }}
lab = {{ name = "webdataset", path = "{root}/lab/*.tar" }}

[extract.silos.heldout]
name = "llava_json"
path = "{root}/heldout/pairs.json"
images = "{root}/heldout"
split = "test"

[language]
path = "{llama_dir}"

[federate]
silos = ["clinic", "lab"]
rounds = 3
batch_size = 4

[federate.optimizer]
learning_rate = 1e-2

[evaluate]
silo = "heldout"
images = "{root}/heldout"
batch_size = 5
bootstrap = 200

[evaluate.benchmarks]
loss = {{ name = "heldout_loss" }}
captions = {{ name = "captions", annotations = "{root}/captions.json", max_new_tokens = 6 }}
pope = {{ name = "pope", questions = {{ random = "{root}/pope.json" }}, max_new_tokens = 3 }}
"""
    )
    return root


@pytest.fixture(scope="session")
def extracted(workplace: Path) -> Path:
    """The experiment file, stage one done."""
    from click.testing import CliRunner

    from fedcmp.cli import main

    result = CliRunner().invoke(main, ["extract", str(workplace / "experiment.toml")])
    assert result.exit_code == 0, result.output
    return workplace / "experiment.toml"


def apart(config: Path, name: str) -> Path:
    """The same experiment with runs of its own, for tests whose runs have names that others use."""
    folder = config.parent / name
    folder.mkdir()
    path = folder / config.name
    path.write_text(f'extends = "{config}"\nbuild = "{folder}/build"\n')
    return path
