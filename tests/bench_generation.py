"""Answers from cached features against Hugging Face on pixels: python tests/bench_generation.py [--small]

Both sides have the same random models in LLaVA's proportions (576 visual tokens, CLIP 384 x 6, Llama
256 x 6, float32) and the same questions, three an image. The naive side is the usual loop: open the
picture, `processor(...)`, `LlavaForConditionalGeneration.generate` on the exported model, one question
at a time. Ours is `fedcmp evaluate`'s own loop over cached features; what stage one spends on the
pictures, once for all runs and benchmarks, is listed apart. Rounds alternate, medians count.
Re-scoring is `fedcmp score` as a process of its own on 10,000 saved answers about 2,000 images.
`--small` is a smoke run without gates.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import picture

from fedcmp.components import load
from fedcmp.evaluate.answering import Reader, answer
from fedcmp.evaluate.answers import answers_path, begin_answers, read_answers
from fedcmp.evaluate.benchmarks.base import SHORT_ANSWER
from fedcmp.evaluate.run import evaluate_run
from fedcmp.evaluate.scoring import model_of
from fedcmp.evaluate.trained import trained_run
from fedcmp.evaluate.work import benchmarks_of, cache_of, prepare
from fedcmp.extract.run import run as extract
from fedcmp.federate.run import run as train
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.export.run import export
from fedcmp.pipeline.hashes import canonical
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.projector import load_projector
from fedcmp.pipeline.models.vision_language import VisionLanguage

HERE = Path(__file__).parent
WORDS = ("dog", "red square", "large star", "blue ring", "small green heart", "cat")
WORLD = HERE.parent / "pipeline/world/weights"


def models(root: Path, small: bool) -> tuple[Path, Path]:
    """A random CLIP tower and a random Llama with the world's tokenizer."""
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
    width = 32 if small else 256
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    language = LlamaForCausalLM(config)
    # Small random embeddings answer everything alike; larger ones tell questions apart.
    language.get_input_embeddings().weight.data.normal_(0, 0.5)
    language.save_pretrained(root / "llama")
    words.save_pretrained(root / "llama")
    return root / "clip", root / "llama"


def pictures(folder: Path, number: int, size: tuple[int, int]) -> list[str]:
    """JPEG files with a caption each."""
    folder.mkdir(parents=True)
    names = [f"{n:06d}.jpg" for n in range(number)]
    for n, name in enumerate(names):
        (folder / name).write_bytes(picture(n, size, "jpeg"))
    rows = "".join(json.dumps({"image": name, "caption": "a small red circle"}) + "\n" for name in names)
    (folder / "captions.jsonl").write_text(rows)
    return names


def experiment(
    root: Path, clip: Path, llama: Path, questions: int, names: list[str], pool: int
) -> Experiment:
    """An untrained run and a POPE of `questions` questions spread over the pictures."""
    rows = [
        {
            "question_id": n,
            "image": names[n % len(names)],
            "text": f"is there a {WORDS[n * 7 % len(WORDS)]} in the picture {'and so on ' * (n % 5)}?",
            "label": ("yes", "no")[n % 2],
        }
        for n in range(questions)
    ]
    (root / "pope.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / "bench.toml"
    path.write_text(
        f"""
experiment = "bench"
device = "cpu"
features = "{root}/features"
build = "{root}/build"
[extract]
dtype = "float32"
encoder = {{ name = "transformers", path = "{clip}", pool = {pool} }}
[extract.silos.pictures]
name = "image_folder"
path = "{root}/pictures"
captions = "{root}/pictures/captions.jsonl"
[language]
path = "{llama}"
[federate]
silos = ["pictures"]
rounds = 0
[evaluate]
silo = "pictures"
batch_size = 16
[evaluate.benchmarks.pope]
name = "pope"
questions = {{ random = "{root}/pope.json" }}
max_new_tokens = 16
"""
    )
    return load(path)


def generation(root: Path, small: bool) -> tuple[float, bool]:
    """Ratio of the naive loop's time to ours, and whether all answers are the same."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    number = 2 if small else 16
    clip, llama = models(root, small)
    setup = experiment(root, clip, llama, 3 * number, pictures(root / "pictures", number, (640, 480)), pool=1)
    start = time.perf_counter()
    extract(setup, only=(), overwrite=False)
    extraction = time.perf_counter() - start
    train(setup)
    export(setup.run_path, "hf", root / "exported", experiment=setup)

    benchmark = benchmarks_of(setup)["pope"]
    cache = cache_of(setup, "pope", benchmark)
    work = prepare(setup, "pope", benchmark, cache)
    language = FrozenLanguageModel(llama, dtype="float32", device="cpu")
    projector, _ = load_projector(setup.run_path / "projector.safetensors")
    reader = Reader(
        VisionLanguage(projector.eval(), language), cache, "plain", "chat", 2048, setup.evaluate.batch_size
    )
    model = LlavaForConditionalGeneration.from_pretrained(root / "exported", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(root / "exported", backend="pil")
    rows = [json.loads(line) for line in (root / "pope.json").read_text().splitlines()]

    def naive() -> dict[str, Any]:
        said = {}
        for row in rows:
            content = [{"type": "image"}, {"type": "text", "text": row["text"] + SHORT_ANSWER}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            image = Image.open(root / "pictures" / row["image"])
            batch = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**batch, max_new_tokens=16, do_sample=False)
            new = output[0, batch["input_ids"].shape[1] :]
            said[f"random/{row['question_id']}"] = processor.decode(new, skip_special_tokens=True).strip()
        return said

    def ours(out: Path) -> dict[str, Any]:
        begin_answers(out, {})
        answer(work, work.items, reader, out, lambda number: None)
        said = read_answers(out, {}).answers
        return {name: said[key] for name, key in work.keys.items()}

    seconds: dict[str, list[float]] = {"naive": [], "ours": []}
    same = True
    for round_ in range(1 if small else 3):
        start = time.perf_counter()
        theirs = naive()
        seconds["naive"].append(time.perf_counter() - start)
        start = time.perf_counter()
        mine = ours(root / f"answers{round_}.jsonl")
        seconds["ours"].append(time.perf_counter() - start)
        same = same and mine == theirs
    plain, cached = median(seconds["naive"]), median(seconds["ours"])
    print(f"\n{len(rows)} questions about {number} pictures, {torch.get_num_threads()} threads")
    for what, spent in (("Hugging Face on pixels, one at a time", plain), ("from cached features", cached)):
        print(f"{what}: {spent:.1f} s, {1000 * spent / len(rows):.0f} ms a question")
    whole = plain / (cached + extraction)
    print(f"extraction, once: {extraction:.1f} s; with all of it counted the ratio is {whole:.1f}x")
    print(f"{len(set(theirs.values()))} different answers; all the same on both sides: {same}")
    return plain / cached, same


def rescoring(root: Path, small: bool) -> float:
    """Seconds of `fedcmp score` on saved answers, with everything from the start of Python."""
    images, questions = (20, 100) if small else (2000, 10_000)
    names = pictures(root / "pictures", images, (48, 48))
    setup = experiment(root, WORLD / "clip", WORLD / "llama", questions, names, pool=2)
    extract(setup, only=(), overwrite=False)
    train(setup)
    benchmark = benchmarks_of(setup)["pope"]
    work = prepare(setup, "pope", benchmark, cache_of(setup, "pope", benchmark))
    run = trained_run(setup)
    (projector,) = run.judged
    model = model_of(run, projector)
    path = answers_path(setup.scores_path, projector, model)
    begin_answers(path, model)
    with path.open("ab") as file:
        for n, key in enumerate(work.keys.values()):
            said = ("Yes", "No, there is none.", "yes")[n % 3]
            file.write(canonical({"key": key, "answer": said}) + b"\n")
    evaluate_run(setup, ())
    command = [sys.executable, "-m", "fedcmp", "score", str(root / "bench.toml")]
    seconds = []
    for _ in range(1 if small else 5):
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    print(f"\nre-scoring {questions:,} saved answers about {images:,} images: {median(seconds):.1f} s")
    return median(seconds)


def main(small: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / name for name in ("generation", "rescoring")]
        for root in roots:
            root.mkdir()
        ratio, same = generation(roots[0], small)
        seconds = rescoring(roots[1], small)
    gates = {
        f"generation is 2 times faster than the naive loop ({ratio:.1f}x)": ratio >= 2,
        "all answers are the same": same,
        f"10,000 answers are scored again within 10 s ({seconds:.1f} s)": seconds <= 10,
    }
    if small:
        return 0 if same else 1
    for gate, passed in gates.items():
        print(f"{'passed' if passed else 'MISSED'}: {gate}")
    return 0 if all(gates.values()) else 1


if __name__ == "__main__":
    sys.exit(main("--small" in sys.argv))
