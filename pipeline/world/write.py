"""Write the embedded default as ordinary files, which the ordinary sources and benchmarks read.

<out>/silos/<silo>/00000.tar        webdataset shards: .png + .json in LLaVA conversation form
<out>/heldout/captions.json         LLaVA JSON, with images/ beside it
<out>/validation/captions.json      the same, for choosing options, where it is asked for
<out>/benchmarks/                   POPE, VQAv2 and COCO caption files over the held-out images
<out>/{heldout,validation}/<task>.json  and benchmarks/<task>.jsonl, where silos have tasks
<out>/manifest.json                 written last
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedcmp.pipeline.files import write_atomic, write_json
from fedcmp.pipeline.manifest import withdraw_manifest, write_manifest
from fedcmp.pipeline.world.scenarios import SCENARIOS, Silo
from fedcmp.pipeline.world.scenes import Content, Scene, render
from fedcmp.pipeline.world.tasks import TASKS, conversation, exchanges
from fedcmp.pipeline.world.texts import COUNTS, caption, exists_questions, short_questions

_DIGITS = {word: str(number) for number, word in enumerate(COUNTS, 1)}
CAPTION_PROMPT = "Render a clear and concise summary of the photo.\n<image>"


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much is written; `silo_images` is the mean over six silos' worth of images."""

    scenario: str = "demo"
    seed: int = 0
    silo_images: int = 1152
    heldout_images: int = 600
    validation_images: int = 0
    shard_images: int = 576


def write(out: Path, amounts: Amounts) -> None:
    """Write silos, held-out images and benchmarks; the same amounts give the same bytes."""
    withdraw_manifest(out)
    silos = SCENARIOS[amounts.scenario](6 * amounts.silo_images)
    for index, silo in enumerate(silos):
        rng = np.random.default_rng([amounts.seed, index])
        _write_silo(out / "silos" / silo.name, silo, amounts.shard_images, rng)
    rng = np.random.default_rng([amounts.seed, len(silos)])
    scenes = [Content().sample(rng) for _ in range(amounts.heldout_images)]
    _write_images(out / "heldout", scenes, rng)
    _write_benchmarks(out / "benchmarks", scenes, rng)
    rng = np.random.default_rng([amounts.seed, len(silos), 1])
    validation = [Content().sample(rng) for _ in range(amounts.validation_images)]
    if validation:
        _write_images(out / "validation", validation, rng)
    if any(silo.task for silo in silos):
        _write_tasks(out, scenes, validation, np.random.default_rng([amounts.seed, len(silos), 2]))
    write_manifest(out, asdict(amounts))


def _png(scene: Scene, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene, rng)).save(buffer, "png")
    return buffer.getvalue()


def _entry(name: str, scene: Scene) -> dict[str, Any]:
    return {
        "id": name,
        "image": f"{name}.png",
        "conversations": [
            {"from": "human", "value": CAPTION_PROMPT},
            {"from": "gpt", "value": caption(scene)},
        ],
    }


def _entry_of(task: str | None, name: str, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    entry = _entry(name, scene)
    return entry if task is None else entry | {"conversations": conversation(exchanges(task, scene, rng))}


def _write_silo(folder: Path, silo: Silo, shard_images: int, rng: np.random.Generator) -> None:
    from webdataset import TarWriter

    content = silo.content(rng)
    for shard, start in enumerate(range(0, silo.images, shard_images)):
        buffer = io.BytesIO()
        with TarWriter(buffer, mtime=0) as tar:
            for number in range(start, min(start + shard_images, silo.images)):
                scene, name = content.sample(rng), f"{number:06d}"
                described = content.sample(rng) if silo.mismatched else scene
                entry = json.dumps(_entry_of(silo.task, name, described, rng)).encode()
                tar.write({"__key__": name, "png": _png(scene, rng), "json": entry})
        write_atomic(folder / f"{shard:05d}.tar", buffer.getvalue())


def _image_name(number: int) -> str:
    return f"{number:06d}.png"


def _write_images(folder: Path, scenes: list[Scene], rng: np.random.Generator) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        (folder / "images" / _image_name(number)).write_bytes(_png(scene, rng))
    entries = [_entry(f"{number:06d}", scene) for number, scene in enumerate(scenes)]
    write_json(folder / "captions.json", entries)


def _write_benchmarks(folder: Path, scenes: list[Scene], rng: np.random.Generator) -> None:
    for split, adversarial in (("random", False), ("adversarial", True)):
        lines = _pope(scenes, rng, adversarial=adversarial)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(folder / f"pope_{split}.json", text.encode())
    questions, annotations = _vqa(scenes, rng)
    write_json(folder / "vqa_questions.json", {"questions": questions})
    write_json(folder / "vqa_annotations.json", {"annotations": annotations})
    write_json(
        folder / "captions.json",
        {
            "images": [{"id": n, "file_name": _image_name(n)} for n in range(len(scenes))],
            "annotations": [
                {"id": n, "image_id": n, "caption": caption(scene)} for n, scene in enumerate(scenes)
            ],
        },
    )


def _write_tasks(out: Path, heldout: list[Scene], validation: list[Scene], rng: np.random.Generator) -> None:
    """What is asked in each task: texts for losses, and tables for benchmarks."""
    for task in TASKS:
        table = out / f"benchmarks/{task}.jsonl"
        for folder, scenes in (("heldout", heldout), ("validation", validation)):
            entries = [_entry_of(task, f"{number:06d}", scene, rng) for number, scene in enumerate(scenes)]
            if entries:
                write_json(out / folder / f"{task}.json", entries)
        rows = [
            {"image": _image_name(number), "question": asked, "answer": answer}
            for number, scene in enumerate(heldout)
            for asked, answer in exchanges(task, scene, rng)
        ]
        write_atomic(table, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _pope(scenes: list[Scene], rng: np.random.Generator, *, adversarial: bool) -> Iterator[dict[str, Any]]:
    number = 0
    for image, scene in enumerate(scenes):
        stream = exists_questions(scene, rng, adversarial=adversarial)
        for wanted in ("yes", "no"):
            question = next(question for question in stream if question.answer == wanted)
            yield {
                "question_id": number,
                "image": _image_name(image),
                "text": question.text,
                "label": wanted,
            }
            number += 1


def _vqa(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, scene in enumerate(scenes):
        pool = short_questions(scene)
        for place in rng.permutation(len(pool))[:3].tolist():
            number, question = len(questions), pool[place]
            # VQAv2's annotators write numbers as digits.
            answer = _DIGITS.get(question.answer, question.answer)
            questions.append({"question_id": number, "image_id": image, "question": question.text})
            annotations.append(
                {
                    "question_id": number,
                    "image_id": image,
                    "question_type": question.kind,
                    "answer_type": "number" if question.kind == "count" else "other",
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer_id": n, "answer": answer, "answer_confidence": "yes"} for n in range(1, 11)
                    ],
                }
            )
    return questions, annotations
