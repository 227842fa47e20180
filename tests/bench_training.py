"""Training steps and extraction against Hugging Face: python tests/bench_training.py [--small]

Random models in LLaVA's proportions: CLIP 384 x 6 at 336 pixels, Llama 256 x 6 with 32,000 words, float32,
576 visual tokens and about 24 of text, batches of 8. `pixels` is the usual step of Hugging Face's
`LlavaForConditionalGeneration` with all parameters taking gradients, `pixels, frozen` the same with only the
projector trained; both get pixels that are decoded already. The others are `fedcmp federate`'s own local
steps from a feature cache. Every method runs in processes of its own: one for CPU seconds a step, the fastest
after a first one, and one for the peak of memory in a step above what there was before it, in which freed
memory goes back at once.

Extraction is `fedcmp extract` from JPEG files to the cache, beside the encoder alone on ready tensors, in
turns. Epochs are the same training with every batch decoded and encoded anew, against extraction once and
the cache.

The rows `mixed` are batches of 16 texts of 20 to 160 words, at once and in micro-batches of similar length;
they are compared with the first of them.
`--small` is a smoke run without gates. Linux only (/proc).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import picture
from PIL import Image

from fedcmp.components import load
from fedcmp.extract.encoders.base import ENCODERS
from fedcmp.extract.run import run as extract
from fedcmp.federate.client.share import Share
from fedcmp.federate.client.step import train_together
from fedcmp.federate.client.stream import Batch, Stream
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.pipeline.cache import open_cache
from fedcmp.pipeline.config import Experiment, Optimizer
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import IMAGE_TOKEN_INDEX
from fedcmp.pipeline.models.vision_language import VisionLanguage

CAPTION = (
    "a small red circle left of a large blue square above a green star and a yellow ring below a purple cross"
)
PIXELS = ("pixels", "pixels, frozen")


@dataclass(frozen=True)
class Way:
    """How the frozen LLM is run."""

    dtype: str = "float32"
    checkpointing: bool = False
    compiled: bool = False
    silo: str = "pictures"
    options: tuple[str, ...] = ()


OURS = {
    "cache": Way(),
    "cache, checkpointing": Way(checkpointing=True),
    "cache, torch.compile": Way(compiled=True),
    "cache, bfloat16 LLM": Way(dtype="bfloat16"),
}
_LONGEST = 160
MIXED = {
    "mixed, all at once": Way(silo="mixed", options=("batch_size=16",)),
    "mixed, micro_batch 4": Way(silo="mixed", options=("batch_size=16", "micro_batch=4")),
    "mixed, micro_tokens": Way(
        silo="mixed", options=("batch_size=16", f"micro_tokens={4 * (576 + _LONGEST)}")
    ),
}
EPOCHS = 3


def prepare(root: Path, small: bool) -> None:
    """Models, pictures and an experiment file."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    from fedcmp.pipeline.world.models import tokenizer

    torch.manual_seed(0)
    width, layers, size = (48, 2, 56) if small else (384, 6, 336)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=6,
        image_size=size,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    CLIPVisionModel(vision).save_pretrained(root / "clip")
    square = {"height": size, "width": size}
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square).save_pretrained(root / "clip")
    words = tokenizer()
    language = LlamaConfig(
        vocab_size=1000 if small else 32_000,
        hidden_size=32 if small else 256,
        intermediate_size=96 if small else 768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(language).save_pretrained(root / "llama")
    words.save_pretrained(root / "llama")
    number = 16 if small else 128
    (root / "pictures").mkdir()
    rows = []
    for n in range(number):
        (root / f"pictures/{n:03d}.jpg").write_bytes(picture(n, (640, 480), "jpeg"))
        rows.append(json.dumps({"image": f"{n:03d}.jpg", "caption": CAPTION}) + "\n")
    (root / "captions.jsonl").write_text("".join(rows))
    words = CAPTION.split()
    mixed = [
        {
            "image": f"{n:03d}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": " ".join(words[k % len(words)] for k in range(length))},
            ],
        }
        for n, length in enumerate(_LONGEST // 2 ** (n % 4) for n in range(number))
    ]
    (root / "mixed.json").write_text(json.dumps(mixed))
    (root / "bench.toml").write_text(
        f"""
experiment = "bench"
device = "cpu"
features = "{root}/features"
build = "{root}/build"
[extract]
batch_size = 16
encoder = {{ name = "transformers", path = "{root}/clip" }}
[extract.silos.pictures]
name = "image_folder"
path = "{root}/pictures"
captions = "{root}/captions.jsonl"
[extract.silos.mixed]
name = "llava_json"
path = "{root}/mixed.json"
images = "{root}/pictures"
[language]
path = "{root}/llama"
[federate]
silos = ["pictures"]
rounds = 1
batch_size = 8
"""
    )


def own_projector(experiment: Experiment, d_vision: int, d_llm: int) -> projectors.Projector:
    """The same random projector everywhere."""
    made = projectors.build(experiment.federate.projector, d_vision=d_vision, d_llm=d_llm)
    projectors.initialise(made, torch.Generator().manual_seed(0))
    return made


def stream(experiment: Experiment, language: FrozenLanguageModel, silo: str = "pictures") -> Stream:
    """A silo's texts and cached features, as in any run."""
    return Stream(
        {silo: open_cache(experiment, silo)},
        language,
        template="plain",
        max_length=2048,
        batch_size=experiment.federate.batch_size,
        turns=1,
        seed=0,
    )


def trained(
    experiment: Experiment,
    language: FrozenLanguageModel,
    batches: Iterator[Batch],
    steps: int,
    share: Share | None = None,
) -> LocalResult:
    """Local steps of the federated client."""
    cache = open_cache(experiment, "pictures")
    scratch = own_projector(experiment, cache.d_vision, language.d_llm).to(language.device)
    job = Job("pictures", projectors.state_of(scratch), turn=0, round=0, rounds=1)
    options = experiment.federate
    (result,) = train_together(
        [job],
        [(steps, batches)],
        VisionLanguage(scratch, language),
        Optimizer(),
        micro_batch=options.micro_batch or options.batch_size,
        micro_tokens=options.micro_tokens,
        share=share,
        advance=lambda _: None,
    )
    return result


def usual_steps(experiment: Experiment, frozen: bool, steps: int) -> Iterator[float]:
    """Hugging Face's own step on pixels; yields losses. The first batches are those of the cache."""
    from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    root = experiment.features.parent
    language = FrozenLanguageModel(root / "llama", dtype="float32", device="cpu")
    order = stream(experiment, language)
    cache = open_cache(experiment, "pictures")
    projector = own_projector(experiment, cache.d_vision, language.d_llm)
    tower, llama = (
        CLIPVisionModel.from_pretrained(root / "clip"),
        LlamaForCausalLM.from_pretrained(root / "llama"),
    )
    image = llama.config.vocab_size - 1
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower.config, text_config=llama.config, image_token_index=image)
    )
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llama.model.state_dict())
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.requires_grad_(not frozen)
    parameters = list(model.model.multi_modal_projector.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0)
    encoder = ENCODERS.build(experiment.extract.encoder, "").load("cpu", "float32")
    rows, batches = order.samples(0), order.batches(0)
    del tower, llama, language
    for step in range(steps):
        batch = next(batches)
        chosen = rows[8 * step : 8 * step + 8]
        names = [cache.ids[cache.text_image[index]] for _, index in chosen]
        images = [Image.open(root / "pictures" / name).convert("RGB") for name in names]
        pixels = torch.stack([torch.from_numpy(encoder.preprocess(each)) for each in images])
        ids = batch.ids.where(batch.ids != IMAGE_TOKEN_INDEX, image)
        ready()
        loss = model(input_ids=ids, pixel_values=pixels, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        yield float(loss.detach())


_marks: list[tuple[float, int]] = []


def ready() -> None:
    """Before a step: CPU seconds so far, and memory from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    _marks.append((time.process_time(), status("VmRSS")))


def status(field: str) -> int:
    """Bytes of this process, by a field of its status."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def measure(method: str, root: Path, small: bool) -> None:
    """One method in this process; prints CPU seconds and memory of its steps, and the first loss."""
    way = (OURS | MIXED).get(method, Way())
    experiment = load(root / "bench.toml", [f"federate.{option}" for option in way.options])
    steps = 1 if small and way.options else 2 if small else 3 if way.options else 5
    seconds, memory, losses = [], [], []

    def done() -> None:
        seconds.append(time.process_time() - _marks[-1][0])
        memory.append(status("VmHWM") - _marks[-1][1])

    if method in PIXELS:
        for loss in usual_steps(experiment, method == PIXELS[1], steps):
            done()
            losses.append(loss)
    else:
        language = FrozenLanguageModel(root / "llama", dtype=way.dtype, device="cpu")
        language.checkpointing, language.compiled = way.checkpointing, way.compiled

        def marked() -> Iterator[Batch]:
            for batch in stream(experiment, language, way.silo).batches(0):
                if _marks:
                    done()
                ready()
                yield batch

        losses = [trained(experiment, language, marked(), steps=1).loss]
        _marks.clear()
        trained(experiment, language, marked(), steps)
        done()
    later = slice(1, None) if len(seconds) > 1 else slice(None)
    print(json.dumps({"seconds": min(seconds[later]), "memory": max(memory[later]), "loss": losses[0]}))


def in_processes(method: str, root: Path, small: bool) -> dict[str, float]:
    """`measure` in processes of its own, one for the time and one for the memory."""
    command = [sys.executable, __file__, "--method", method, str(root)] + ["--small"] * small
    figures: list[dict[str, float]] = []
    for changes in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
        shown = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | changes
        ).stdout
        figures.append(json.loads(shown.splitlines()[-1]))
    print(f"  {method}: {figures[0]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return figures[0] | {"memory": figures[1]["memory"]}


def extraction(root: Path, small: bool) -> tuple[float, float, float]:
    """Images a second of extraction, its share of the bare encoder's (the median over turns), its seconds."""
    experiment = load(root / "bench.toml", [f"features={root}/again"])
    encoder = ENCODERS.build(experiment.extract.encoder, "").load("cpu", "float32")
    files = sorted((root / "pictures").glob("*.jpg"))
    pixels = torch.stack([torch.from_numpy(encoder.preprocess(Image.open(f).convert("RGB"))) for f in files])
    encoder.encode(pixels[:2])
    seconds, shares = [], []
    for _ in range(1 if small else 5):
        start = time.perf_counter()
        for batch in pixels.split(experiment.extract.batch_size):
            encoder.encode(batch)
        bare = time.perf_counter() - start
        (outcome,) = extract(experiment, only=("pictures",), overwrite=True)
        seconds.append(outcome.seconds)
        shares.append(bare / outcome.seconds)
    return len(files) / median(seconds), median(shares), median(seconds)


def epochs(root: Path, extracting: float) -> tuple[float, float]:
    """Seconds of some epochs from the cache with its extraction, and of encoding in every epoch."""
    experiment = load(root / "bench.toml")
    language = FrozenLanguageModel(root / "llama", dtype="float32", device="cpu")
    encoder = ENCODERS.build(experiment.extract.encoder, "").load("cpu", "float32")
    cache, order = open_cache(experiment, "pictures"), stream(experiment, language)
    size = experiment.federate.batch_size

    def encoded() -> Iterator[Batch]:
        for step, batch in enumerate(order.batches(0)):
            chosen = order.samples(0)[size * step : size * (step + 1)]
            names = [cache.ids[cache.text_image[index]] for _, index in chosen]
            images = [Image.open(root / "pictures" / name).convert("RGB") for name in names]
            pixels = torch.stack([torch.from_numpy(encoder.preprocess(image)) for image in images])
            yield replace(batch, features=encoder.encode(pixels))

    spent = []
    for batches in (order.batches(0), encoded()):
        start = time.perf_counter()
        trained(experiment, language, batches, order.steps(0))
        spent.append(time.perf_counter() - start)
    return extracting + EPOCHS * spent[0], EPOCHS * spent[1]


def main(small: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, small)
        extract(load(root / "bench.toml"), only=(), overwrite=False)
        methods = (*PIXELS, *OURS, *MIXED)
        results: dict[str, Any] = {name: in_processes(name, root, small) for name in methods}
        rate, share, seconds = extraction(root, small)
        cached, encoding = epochs(root, seconds)
    usual = results[PIXELS[0]]
    print(f"\n{torch.get_num_threads()} threads, batches of 8")
    print(f"{'':24}{'CPU s a step':>14}{'faster':>9}{'memory, MB':>12}{'of it':>8}{'first loss':>12}")
    for name, result in results.items():
        beside = results[next(iter(MIXED))] if name in MIXED else usual
        faster, kept = beside["seconds"] / result["seconds"], result["memory"] / beside["memory"]
        print(f"{name:24}{result['seconds']:14.2f}{faster:8.1f}x{result['memory'] / 1e6:12,.0f}", end="")
        print(f"{kept:8.2f}{result['loss']:12.5f}")
    print(f"extraction: {rate:.1f} images/s, {share:.2f} of the bare encoder's rate")
    print(
        f"{EPOCHS} epochs: {cached:.1f} s with extraction and cache, {encoding:.1f} s encoding every time: ",
        end="",
    )
    print(f"{encoding / cached:.2f}x")
    ours = results["cache"]
    off = abs(ours["loss"] - usual["loss"])
    gates = {
        "a step is 2.5 times faster than on pixels": usual["seconds"] >= 2.5 * ours["seconds"],
        "a step takes 0.3 of the memory": ours["memory"] <= 0.3 * usual["memory"],
        f"the first loss is the same (off by {off:.1e}, features in bfloat16)": off <= 1e-3,
        f"extraction reaches 0.9 of the bare encoder: {share:.2f}": share >= 0.9,
    }
    if small:
        return 0
    for gate, passed in gates.items():
        print(f"{'passed' if passed else 'MISSED'}: {gate}")
    return 0 if all(gates.values()) else 1


if __name__ == "__main__":
    if "--method" in sys.argv:
        at = sys.argv.index("--method")
        measure(sys.argv[at + 1], Path(sys.argv[at + 2]), "--small" in sys.argv)
    else:
        sys.exit(main("--small" in sys.argv))
