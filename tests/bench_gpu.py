"""A GPU against Hugging Face on the same GPU: python tests/bench_gpu.py [--small] [PART ...]

Random models of real shapes: CLIP ViT-L/14 at 336 pixels, an LLM of Vicuna-7B's and one of Qwen2.5-0.5B's
configuration, weights in bfloat16, 576 visual tokens and a caption of about 25. Parts:

- `correct`: losses on the GPU against the CPU's, pinned buffers, 8 and 4 bits, equal bytes of a second run.
- `extraction`: `fedcmp extract` from JPEG files beside the encoder alone on ready tensors.
- `training`: `fedcmp federate`'s own local steps from that cache, beside the usual step of Hugging Face's
  `LlavaForConditionalGeneration` on ready pixels with the same weights. MFU is the share of the data sheet's
  dense bfloat16 peak, from the FLOPs that `fedcmp plan` counts for a step with a frozen LLM; what is computed
  again under checkpointing does not count.
- `generation`: batched answers from cached features, beside `generate` on them, one question at a time.
- `workers`: extraction by several processes (`--worker i/n`) on the one GPU.
- `federate`: the whole command on the cache, with the smaller LLM.
- `aggregation`: FedAvg, Fed-CMP and Muon at LLaVA-1.5-7B size, eight clients, on the CPU and on the GPU.

Without CUDA it says so and ends well. `--small` is a smoke run of tiny shapes on any machine.
"""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_aggregation import State, make_round
from bench_training import CAPTION, stream, trained
from conftest import picture

from fedcmp.components import load
from fedcmp.extract.encoders.base import ENCODERS
from fedcmp.extract.run import run as extract
from fedcmp.extract.workers import Worker
from fedcmp.federate.arithmetic.place import computing_on
from fedcmp.federate.messages import LocalResult
from fedcmp.federate.ranks.sums import Sums
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.federate.strategies.fedcmp import FedCmp
from fedcmp.federate.strategies.muon import Muon
from fedcmp.pipeline.cache import open_cache
from fedcmp.pipeline.cache.loader import float_batches
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.device import PEAKS
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import question, tokenise_all
from fedcmp.pipeline.models.shape import language_shape
from fedcmp.pipeline.run_folder import read_history

CONFIGS = Path(__file__).parent.parent / "configs/models"
PARTS = ("correct", "extraction", "workers", "training", "federate", "generation", "aggregation")
LANGUAGES = {"7B": "vicuna-7b-v1.5", "0.5B": "Qwen2.5-0.5B-Instruct"}
_PEAK = {name: peak * 1e12 for name, peak in PEAKS.items()}


@dataclass(frozen=True)
class Setting:
    """What is measured where.

    Attributes:
        root: Models, pictures and caches.
        device: `cuda`, or `cpu` in a smoke run.
        small: Tiny shapes.
    """

    root: Path
    device: str
    small: bool

    @property
    def peak(self) -> float:
        """The data sheet's dense bfloat16 FLOP/s of the card, 0 where it is not known."""
        name = torch.cuda.get_device_name().lower() if self.device == "cuda" else ""
        return next((peak for known, peak in _PEAK.items() if known in name), 0.0)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], times: int = 1) -> float:
        """Median of the seconds that some work takes."""
        spent = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            spent.append(time.perf_counter() - began)
        return median(spent)

    def memory(self) -> float:
        """GB that torch held at the most since `forget`."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0.0

    def forget(self) -> None:
        """Free what is unused, and begin to watch memory anew."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def say(text: str) -> None:
    """A line at once, as a run may be cut off."""
    print(text, flush=True)


def _write_picture(path: Path, seed: int) -> None:
    path.write_bytes(picture(seed, (640, 480), "jpeg"))


def prepare(setting: Setting) -> None:
    """Vision tower, pictures and an experiment file."""
    from transformers import AutoConfig, CLIPImageProcessorPil, CLIPVisionModel

    root, small = setting.root, setting.small
    config = AutoConfig.from_pretrained(CONFIGS / "clip-vit-large-patch14-336")
    if small:
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 48, 96, 3
        config.num_attention_heads, config.image_size = 4, 56
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(root / "clip")
    square = {"height": config.image_size, "width": config.image_size}
    CLIPImageProcessorPil(size={"shortest_edge": config.image_size}, crop_size=square).save_pretrained(
        root / "clip"
    )
    (root / "pictures").mkdir()
    names = [f"{n:05d}.jpg" for n in range(24 if small else 2048)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_picture, [root / "pictures" / name for name in names], range(len(names))))
    rows = "".join(json.dumps({"image": name, "caption": CAPTION}) + "\n" for name in names)
    (root / "captions.jsonl").write_text(rows)
    lengths = [20 * 2 ** (n % 5) for n in range(len(names) // 2)]
    mixed = [
        {
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": " ".join(CAPTION.split()[n % 20] for n in range(length))},
            ],
        }
        for name, length in zip(names, lengths, strict=False)
    ]
    (root / "mixed.json").write_text(json.dumps(mixed))
    (root / "bench.toml").write_text(
        f"""
experiment = "bench"
device = "{setting.device}"
features = "{root}/features"
build = "{root}/build"
[extract]
batch_size = {8 if small else 128}
workers = {2 if small else 16}
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
path = "{root}/llm"
[federate]
silos = ["pictures"]
rounds = 1
batch_size = {8 if small else 32}
"""
    )


def write_language(setting: Setting, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random LLM of a real configuration with a small tokenizer, saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedcmp.pipeline.world.models import tokenizer

    out, words = setting.root / f"llm-{name}", tokenizer()
    config = AutoConfig.from_pretrained(CONFIGS / LANGUAGES.get(name, LANGUAGES["7B"]))
    if name == "tiny" or setting.small:
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
        config.num_attention_heads = config.num_key_value_heads = 4
        config.vocab_size = 1000
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    config.pad_token_id = words.pad_token_id
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(out, max_shard_size="4GB")
    words.save_pretrained(out)
    return out


def experiment_of(setting: Setting, *overrides: str) -> Experiment:
    """The experiment file with changes."""
    return load(setting.root / "bench.toml", overrides)


def extraction(setting: Setting) -> None:
    """Images a second of stage one and of the encoder alone."""
    experiment = experiment_of(setting)
    dtype = "bfloat16" if setting.device == "cuda" else "float32"
    encoder = ENCODERS.build(experiment.extract.encoder, "").load(setting.device, dtype)
    from PIL import Image

    files = sorted((setting.root / "pictures").glob("*.jpg"))
    size = experiment.extract.batch_size
    began = time.perf_counter()
    pixels = torch.stack(
        [torch.from_numpy(encoder.preprocess(Image.open(file).convert("RGB"))) for file in files[:size]]
    )
    alone = size / (time.perf_counter() - began)
    ready = pixels.to(setting.device)
    encoder.encode(ready[:2])
    steps = 2 if setting.small else 8

    def bare() -> None:
        for _ in range(steps):
            encoder.encode(ready)

    setting.seconds(bare)
    rate = steps * len(ready) / setting.seconds(bare, 3)
    (outcome,) = extract(experiment, only=("pictures",), overwrite=True)
    ours = len(files) / outcome.seconds
    say(
        f"extraction: {ours:,.0f} images/s from JPEG to cache, {ours / rate:.2f} of the bare encoder's "
        f"{rate:,.0f}; one thread decodes and prepares {alone:,.0f} images/s"
    )


def _worker(path: Path, options: list[str], index: int, count: int, ready: Any) -> float:
    """Seconds of one of several processes, from when all have read the program."""
    experiment = load(path, options)
    torch.zeros(1, device=experiment.device)
    ready.wait()
    began = time.perf_counter()
    extract(experiment, only=("pictures",), overwrite=False, worker=Worker(index, count))
    return time.perf_counter() - began


def workers(setting: Setting) -> None:
    """Images a second of several processes, each with an encoder of its own, loading included."""
    number = len(list((setting.root / "pictures").glob("*.jpg")))
    for count in (1, 2) if setting.small else (1, 4, 8):
        over = [
            f"features={setting.root}/by-{count}",
            f"extract.workers={max(16 // count, 2)}",
            f"extract.shard_images={max(number // 16, 1)}",
        ]
        context = get_context("spawn")
        with context.Manager() as manager, ProcessPoolExecutor(count, context) as pool:
            ready = manager.Barrier(count)
            jobs = [
                pool.submit(_worker, setting.root / "bench.toml", over, index, count, ready)
                for index in range(count)
            ]
            spent = max(job.result() for job in jobs)
        say(f"extraction by {count} processes: {number / spent:,.0f} images/s, loading included")


def steps_from_cache(setting: Setting, language: FrozenLanguageModel, *options: str, silo: str) -> float:
    """Samples a second of local training after the first two steps, without a wait between the others."""
    experiment = experiment_of(setting, *(f"federate.{option}" for option in options))
    size, own = experiment.federate.batch_size, stream(experiment, language, silo)
    number = min(4 if setting.small or size > 32 else 8, own.steps(0))
    began = 0.0

    def batches() -> Any:
        nonlocal began
        for step, batch in enumerate(own.batches(0)):
            if step == 2:
                setting.wait()
                began = time.perf_counter()
            yield batch

    trained(experiment, language, batches(), number)
    setting.wait()
    return size * (number - 2) / (time.perf_counter() - began)


def rate_of(
    setting: Setting, language: FrozenLanguageModel, way: str, *options: str, silo: str
) -> float | None:
    """`steps_from_cache`, or None where memory does not suffice."""
    setting.forget()
    try:
        return steps_from_cache(setting, language, *options, silo=silo)
    except torch.OutOfMemoryError:
        say(f"  {way}: out of memory")
        return None


def usual_step(setting: Setting, language: FrozenLanguageModel, frozen: bool, size: int) -> float:
    """Samples a second of Hugging Face's own step on ready pixels, sharing the LLM's weights."""
    from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

    experiment = experiment_of(setting)
    tower = CLIPVisionModel.from_pretrained(setting.root / "clip", dtype=torch.bfloat16)
    llm, image = language.model, language.model.config.vocab_size - 1
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=tower.config,
                text_config=llm.config,
                image_token_index=image,
                image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
            )
        )
    model.model.language_model, model.lm_head = llm.get_decoder(), llm.get_output_embeddings()
    model.model.vision_tower = tower.to(setting.device)
    connector = model.model.multi_modal_projector.to_empty(device=setting.device).to(torch.bfloat16)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW(connector.requires_grad_(True).parameters(), 1e-3, weight_decay=0)
    own = stream(experiment, language)
    batch = next(iter(own.batches(0)))
    ids = batch.ids[:size].where(batch.ids[:size] >= 0, image).to(setting.device)
    labels = batch.labels[:size].to(setting.device)
    side = tower.config.image_size
    pixels = torch.randn(size, 3, side, side, device=setting.device, dtype=torch.bfloat16)

    def step() -> None:
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(connector.parameters(), 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)

    step()
    rate = size / setting.seconds(step, 2 if setting.small else 4)
    llm.requires_grad_(False)
    return rate


def training(setting: Setting) -> None:
    """Local steps of both sizes."""
    cache = open_cache(experiment_of(setting), "pictures")
    for name in LANGUAGES:
        path = write_language(setting, name)
        shape = language_shape(path)
        language = FrozenLanguageModel(path, dtype="bfloat16", device=setting.device)
        own = stream(experiment_of(setting), language)
        text = len(own_tokens(own)) - cache.patches
        flops = shape.training_flops(cache.patches, text, checkpointing=False)
        say(f"{name}: {flops / 1e12:.2f} TFLOP a sample, {cache.patches} visual tokens and {text} others")
        sizes = (4, 8) if setting.small else (32, 128)
        micro = 4 if setting.small else 8
        # Batch, micro-batch, checkpointing, torch.compile.
        ways = {
            f"cache, micro-batch {some}": (sizes[0], some, False, False)
            for some in ((2, 4) if setting.small else (4, 8, 16) if name == "7B" else (8, 32))
        }
        ways[f"cache, micro-batch {micro}, batch {sizes[1]}"] = (sizes[1], micro, False, False)
        ways[f"cache, micro-batch {micro}, checkpointing"] = (sizes[0], micro, True, False)
        ways[f"cache, micro-batch {micro}, compiled"] = (sizes[0], micro, False, True)
        rows: dict[str, tuple[float, float]] = {}
        for way, (size, small_batch, checkpointing, compiled) in ways.items():
            language.checkpointing, language.compiled = checkpointing, compiled
            options = (f"batch_size={size}", f"micro_batch={small_batch}")
            rate = rate_of(setting, language, way, *options, silo="pictures")
            if rate is not None:
                rows[way] = rate, setting.memory()
                report(setting, way, rows, flops)
        language.checkpointing = language.compiled = False
        most = micro * (cache.patches + 320)
        for way, options in {
            "unsorted": (f"micro_batch={sizes[0]}",),
            f"micro-batch {micro}": (f"micro_batch={micro}",),
            f"{most} tokens": (f"micro_batch={sizes[0]}", f"micro_tokens={most}"),
        }.items():
            rate = rate_of(setting, language, way, f"batch_size={sizes[0]}", *options, silo="mixed")
            if rate is not None:
                say(f"  texts of 20 to 320 words, {way}: {rate:.1f} samples/s, {setting.memory():.1f} GB")
        for frozen in (True, False):
            way = "Hugging Face on pixels" + (", frozen" if frozen else ", as loaded")
            setting.forget()
            try:
                rate = usual_step(setting, language, frozen, micro)
            except torch.OutOfMemoryError:
                say(f"  {way}: out of memory at batch {micro}")
                language.model.requires_grad_(False)
                continue
            rows[way] = rate, setting.memory()
            report(setting, way, rows, flops)
        del language, own
        setting.forget()


def report(setting: Setting, way: str, rows: dict[str, tuple[float, float]], flops: float) -> None:
    """One row, with its ratio to the first one."""
    (rate, memory), first = rows[way], next(iter(rows.values()))[0]
    used = f"{rate * flops / setting.peak:.1%} MFU" if setting.peak else "MFU of an unknown peak"
    say(f"  {way}: {rate:.1f} samples/s ({rate / first:.2f} of the first), {used}, {memory:.1f} GB")


def own_tokens(own: Any) -> list[int]:
    """Token ids of one sample of a stream."""
    batch = next(iter(own.batches(0)))
    return batch.ids[0].tolist()


def federate(setting: Setting) -> None:
    """`fedcmp federate` in a process of its own, from its start to its end."""
    path = write_language(setting, "0.5B")
    micro = 4 if setting.small else 32
    for run, more in {"as it is": [], "compiled": ["federate.compile=true"]}.items():
        command = [sys.executable, "-m", "fedcmp", "federate", str(setting.root / "bench.toml")]
        over = [f"run={run.split()[0]}", f"language.path={path}", f"federate.micro_batch={micro}", *more]
        began = time.perf_counter()
        shown = subprocess.run(
            [*command, *(word for each in over for word in ("--set", each))],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        spent = time.perf_counter() - began
        check(f"fedcmp federate {run}: {shown.stdout[-600:]}{shown.stderr[-600:]}", shown.returncode == 0)
        rows = read_history(setting.root / "build/runs/bench" / run.split()[0])
        own = next(row for row in rows if row["client"] is not None)
        say(
            f"fedcmp federate, 0.5B, {run}: {own['samples'] / own['seconds']:.1f} samples/s in training, "
            f"{own['flops'] / own['seconds'] / 1e12:.0f} TFLOP/s; {spent:.1f} s in all, loading included"
        )


def generation(setting: Setting) -> None:
    """Answers a second with the larger LLM, batched from features and one at a time on projected ones."""
    name = "7B"
    path = setting.root / f"llm-{name}"
    language = FrozenLanguageModel(
        path if path.exists() else write_language(setting, name), dtype="bfloat16", device=setting.device
    )
    cache = open_cache(experiment_of(setting), "pictures")
    images, words = (4, 4) if setting.small else (128, 16)
    made = projectors.build(
        experiment_of(setting).federate.projector, d_vision=cache.d_vision, d_llm=language.d_llm
    )
    projectors.initialise(made, torch.Generator().manual_seed(0))
    made = made.to(setting.device).eval()
    order = [(0, row) for row in range(images)]
    import numpy as np

    asked = ("is there a dog?", "is there a large red square left of the blue ring in this picture?")
    texts = [question(each) for _ in range(images) for each in asked]
    tokens = tokenise_all(texts, "v1", language.tokenizer, patches=cache.patches, max_length=2048)
    size = 4 if setting.small else 64

    def ours() -> list[str]:
        said: list[str] = []
        batches = float_batches([cache], np.array(order), size // 2, torch.device(setting.device))
        with torch.inference_mode():
            for start, features in zip(range(0, len(tokens), size), batches, strict=True):
                owners = [n // 2 for n in range(len(tokens[start : start + size]))]
                said += language.generate(
                    tokens[start : start + size], made(features), owners, max_new_tokens=words, stop=None
                )
        return said

    features = next(iter(float_batches([cache], np.array(order[:1]), 1, torch.device(setting.device))))
    model, few = language.model, 2 if setting.small else 8

    def naive() -> None:
        for sample in tokens[:few]:
            ids = torch.tensor([sample.ids], device=setting.device)
            with torch.inference_mode():
                embeds = language.embed(ids, made(features))
                model.generate(
                    inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=words,
                    min_new_tokens=words, do_sample=False, pad_token_id=0,
                )  # fmt: skip

    setting.seconds(naive)
    ours()
    setting.forget()
    rate, alone = len(tokens) / setting.seconds(ours, 2), few / setting.seconds(naive, 2)
    say(
        f"generation, {name}: {rate:.1f} answers/s of at most {words} tokens in batches of {size}, "
        f"{rate / alone:.1f} times one at a time ({alone:.2f}); {setting.memory():.1f} GB"
    )


def aggregation(setting: Setting) -> None:
    """Seconds of the server's step, and of the card's own eigenpairs."""
    state, updates = make_round(setting.small)
    strategies = {
        "FedAvg": FedAvg(),
        "Fed-CMP": FedCmp(),
        "Fed-CMP, randomised": FedCmp(basis="randomised"),
        "Muon": Muon(),
    }
    ends: dict[str, State] = {}
    for device in dict.fromkeys(("cpu", setting.device)):
        for name, strategy in strategies.items():
            with computing_on(device):
                # A library's first call is not the work's.
                strategy.aggregate(state, updates, {}) if device != "cpu" else None
                setting.forget()
                began = time.perf_counter()
                state_then = strategy.aggregate(state, updates, {}).state
                setting.wait()
            spent = time.perf_counter() - began
            where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
            say(f"aggregation, {name}: {spent:.2f} s on {where}, {setting.memory():.1f} GB of the GPU's")
            if device == "cpu":
                ends[name] = state_then
                continue
            off = max(
                float((each - ends[name][key]).norm() / (each - state[key]).norm())
                for key, each in state_then.items()
            )
            # Which directions of a flat spectrum a sketch finds depends on rounding.
            limit = 2e-2 if "randomised" in name else 1e-4
            check(f"what {name} moves by on {device}: off by {off:.1e} of the CPU's", off <= limit)


def correct(setting: Setting) -> None:
    """What the GPU computes against the CPU."""
    import numpy as np

    experiment = experiment_of(setting)
    cpu, there = torch.device("cpu"), torch.device(setting.device)
    cache = open_cache(experiment, "pictures")
    order = np.array([(0, row) for row in range(min(16, cache.images))])
    pairs = zip(float_batches([cache], order, 4, there), float_batches([cache], order, 4, cpu), strict=True)
    same = all(bool(torch.equal(ours.cpu(), theirs)) for ours, theirs in pairs)
    check("features through pinned buffers are those of the cache", same)
    from PIL import Image

    files = sorted((setting.root / "pictures").glob("*.jpg"))[:4]
    states = {}
    for device, dtype in (("cpu", "float32"), (setting.device, "float32"), (setting.device, "bfloat16")):
        encoder = ENCODERS.build(experiment.extract.encoder, "").load(device, dtype)
        pixels = [torch.from_numpy(encoder.preprocess(Image.open(file).convert("RGB"))) for file in files]
        states[device, dtype] = encoder.encode(torch.stack(pixels)).float().cpu()
    reference = states["cpu", "float32"]
    for key, limit in (((setting.device, "float32"), 1e-4), ((setting.device, "bfloat16"), 2e-2)):
        off = float((states[key] - reference).norm() / reference.norm())
        check(f"features in {key[1]}: off by {off:.1e} of the CPU's in float32", off <= limit)
    path = write_language(setting, "tiny", torch.float32)
    losses: dict[tuple[str, str, str], float] = {}
    ways = [
        ("cpu", "float32", "none"),
        (setting.device, "float32", "none"),
        (setting.device, "bfloat16", "none"),
    ]
    if setting.device == "cuda" and find_spec("bitsandbytes"):
        ways += [(setting.device, "bfloat16", "8bit"), (setting.device, "bfloat16", "4bit")]

    def steps(language: FrozenLanguageModel) -> LocalResult:
        return trained(experiment, language, stream(experiment, language).batches(0), steps=2)

    for device, dtype, bits in ways:
        language = FrozenLanguageModel(path, dtype=dtype, device=device, quantize=bits)
        losses[device, dtype, bits] = steps(language).loss or 0.0
        for strict in (False, True) if device == setting.device and bits == "none" else ():
            torch.use_deterministic_algorithms(strict)
            first, second = (projectors.content_hash(steps(language).state) for _ in range(2))
            torch.use_deterministic_algorithms(False)
            how = " under deterministic algorithms" if strict else ""
            say(f"two runs in {dtype}{how} end in {'equal' if first == second else 'different'} bytes")
    if setting.device == "cuda":
        over_nccl(setting, FrozenLanguageModel(path, dtype="float32", device=setting.device))
    wanted = losses["cpu", "float32", "none"]
    limits = {
        "none": {"float32": 1e-5, "bfloat16": 1e-2},
        "8bit": {"bfloat16": 0.05},
        "4bit": {"bfloat16": 0.2},
    }
    for (device, dtype, bits), loss in losses.items():
        off = abs(loss - wanted) / wanted
        what = dtype if bits == "none" else bits
        check(f"loss of two steps on {device} in {what}: off by {off:.1e}", off <= limits[bits][dtype])


def over_nccl(setting: Setting, language: FrozenLanguageModel) -> None:
    """A step's sums and a sharded LLM over a process group of NCCL; on one GPU it is of one process."""
    from fedcmp.federate.ranks.sharding import shard

    experiment = experiment_of(setting)

    def ended(share: Any = None) -> str:
        own = stream(experiment, language).batches(0)
        return projectors.content_hash(trained(experiment, language, own, 2, share).state)

    alone = ended()
    at_end: list[Callable[[], None]] = []
    ranks: Any = SimpleNamespace(rank=0, count=1, store=torch.distributed.HashStore(), at_end=at_end)
    shares = {"gathered": Sums(ranks, setting.device, in_order=True)}
    shares["reduced"] = reduced = copy.copy(shares["gathered"])
    reduced._in_order = False
    for name, sums in shares.items():
        own = ended(SimpleNamespace(alone=False, summed=sums.summed))
        check(f"sums {name} over NCCL end in the same bytes", own == alone)
    shard(language, setting.device, 1)
    own = ended(SimpleNamespace(alone=False, summed=shares["gathered"].summed))
    check("a sharded LLM over NCCL ends in the same bytes", own == alone)
    for end in at_end:
        end()


_missed: list[str] = []


def check(what: str, holds: bool) -> None:
    """A line, and a mark where it does not hold."""
    say(f"{'passed' if holds else 'MISSED'}: {what}")
    if not holds:
        _missed.append(what)


def main(parts: list[str], small: bool) -> int:
    unknown = sorted({*parts} - {*PARTS})
    if unknown:
        print(f"bench_gpu: no part is called {unknown[0]}; known: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    cuda = torch.cuda.is_available()
    if not cuda and not small:
        say("bench-gpu: skipped, torch sees no CUDA device; --small runs tiny shapes on the CPU")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), "cuda" if cuda else "cpu", small)
        say(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}")
        prepare(setting)
        chosen = [part for part in PARTS if part in parts or not parts]
        if "extraction" in chosen:
            extract(experiment_of(setting), only=("mixed",), overwrite=False)
        else:
            extract(experiment_of(setting), only=(), overwrite=False)
        # The others read the cache that it writes.
        for part in sorted(chosen, key=lambda part: part != "extraction"):
            began = time.perf_counter()
            try:
                globals()[part](setting)
            except Exception:
                check(f"{part}: {traceback.format_exc()}", False)
            say(f"({part}: {time.perf_counter() - began:.0f} s)")
            setting.forget()
    return 1 if _missed else 0


if __name__ == "__main__":
    names = [each for each in sys.argv[1:] if each != "--small"]
    sys.exit(main(names, "--small" in sys.argv))
