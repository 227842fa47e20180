"""Tiny files in the official form of every benchmark, about pictures that are written beside them.

Every function writes its benchmark's files into a folder and returns its options; pictures lie where
the official archives have them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import picture

from fedcmp.evaluate.benchmarks.mme import COGNITION, PERCEPTION

IMAGES = 6
Options = dict[str, Any]


def draw(folder: Path, name: str, seed: int) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed, form="png" if name.endswith(".png") else "jpeg"))
    return name


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pope(root: Path) -> Options:
    splits = {}
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": n + 1,
                "image": draw(root / "val2014", f"COCO_val2014_{n // 2:012d}.jpg", n // 2),
                "text": f"Is there a {('dog', 'cat')[n % 2]} in the image?",
                "label": ("yes", "no")[n % 2],
            }
            for n in range(2 * IMAGES)
        ]
        splits[split] = lines(root / f"coco_pope_{split}.json", rows)
    return {"questions": splits, "images": root / "val2014"}


def mme(root: Path) -> Options:
    for category in (*PERCEPTION, *COGNITION):
        nested = category in ("artwork", "celebrity", "landmark", "posters", "scene")
        texts = root / category / "questions_answers_YN" if nested else root / category
        images = root / category / "images" if nested else root / category
        texts.mkdir(parents=True)
        for n in range(2):
            draw(images, f"{n:04d}.{('jpg', 'png')[n]}", n)
            asked = [f"Is this a {what}? Please answer yes or no." for what in ("dog", "cat")]
            (texts / f"{n:04d}.txt").write_text(f"{asked[0]}\tYes\n{asked[1]}\tNo\n")
    return {"path": root, "images": root}


def mmbench(root: Path) -> Options:
    heads = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "source"]
    rows = ["\t".join([*heads, "image", "split"])]
    for n in range(4):
        options = ["a red bus", "a blue car", "two people", "a dog"][: 4 if n % 2 else 2]
        for turn in range(len(options)):
            rotated = options[turn:] + options[:turn]
            shown = rotated + [""] * (4 - len(options))
            image = base64.b64encode(picture(n, form="jpeg")).decode() if not turn else str(n)
            hint = "the picture shows a street" if n else ""
            answer = "ABCD"[rotated.index("a red bus")]
            group = [("recognition", "coarse"), ("logic", "reasoning")][n % 2]
            row = [str(n + turn * 1_000_000), "What is it?", hint, *shown, answer, *group, "own"]
            rows.append("\t".join([*row, image, "dev"]))
    path = root / "mmbench_dev.tsv"
    path.write_text("\n".join(rows) + "\n")
    return {"path": path, "images": root / "unpacked"}


def mm_vet(root: Path) -> Options:
    questions = {
        f"v1_{n}": {
            "imagename": draw(root / "images", f"v1_{n}.png", n),
            "question": "What is x in the equation?",
            "answer": "-1<AND>-5",
            "capability": ["ocr", "math"] if n % 2 else ["rec"],
        }
        for n in range(IMAGES)
    }
    return {"path": dump(root / "mm-vet.json", questions), "images": root / "images", "max_new_tokens": 12}


def seed_bench(root: Path) -> Options:
    questions = [
        {
            "question_id": str(n),
            "question": "What is it?",
            **{
                f"choice_{letter}": word
                for letter, word in zip("abcd", ("dog", "cat", "ox", "hen"), strict=True)
            },
            "answer": "ABCD"[n % 4],
            "data_id": draw(root / "SEED-Bench-image", f"{n}_{n}", n),
            "question_type_id": 1 + n % 3,
            "data_type": "image",
        }
        for n in range(IMAGES)
    ]
    film = questions[0] | {
        "question_id": "v1",
        "question_type_id": 10,
        "data_type": "video",
        "data_id": "1.webm",
    }
    content = {
        "questions": [*questions, film],
        "question_type": {"Scene Understanding": 1, "Action Recognition": 10},
    }
    return {"path": dump(root / "SEED-Bench.json", content), "images": root / "SEED-Bench-image"}


def scienceqa(root: Path) -> Options:
    problems, entries = {}, []
    for n in range(IMAGES):
        problems[str(n)] = {"choices": ["yes", "no", "maybe"], "answer": n % 3, "subject": "natural science"}
        asked = f"Is it {n}?\nA. yes\nB. no\nC. maybe"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "The answer is A."}]
        entry = {"id": str(n), "conversations": turns}
        if n:
            draw(root / "images/test", f"{n}/image.png", n)
            entry |= {"image": f"{n}/image.png"}
            turns[0]["value"] = f"<image>\n{asked}"
        entries.append(entry)
    return {
        "problems": dump(root / "problems.json", problems),
        "splits": dump(root / "pid_splits.json", {"test": [str(n) for n in range(IMAGES)], "train": ["77"]}),
        "questions": dump(root / "llava_test_CQM-A.json", entries),
        "images": root / "images/test",
    }


def textvqa(root: Path) -> Options:
    data = [
        {
            "question_id": 34602 + n,
            "image_id": f"{n:016x}",
            "question": "What brand is it?",
            "answers": ["nokia"] * 7 + ["Nokia phone"] * 3,
        }
        for n in range(IMAGES)
    ]
    ocr = [{"image_id": entry["image_id"], "ocr_tokens": ["NOKIA", "3310"]} for entry in data[1:]]
    for n, entry in enumerate(data):
        draw(root / "train_images", f"{entry['image_id']}.jpg", n)
    return {
        "annotations": dump(root / "TextVQA_0.5.1_val.json", {"data": data}),
        "ocr": dump(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr}),
        "images": root / "train_images",
    }


def vqav2(root: Path) -> Options:
    questions, annotations = [], []
    for n in range(IMAGES):
        draw(root / "val2014", f"COCO_val2014_{n:012d}.jpg", n)
        questions.append({"question_id": 1000 * n, "image_id": n, "question": "Is it red?"})
        answers = [{"answer": ("yes", "no")[k > 7], "answer_id": k + 1} for k in range(10)]
        annotations.append(
            {"question_id": 1000 * n, "image_id": n, "answers": answers, "answer_type": "yes/no"}
        )
    return {
        "questions": dump(root / "questions.json", {"questions": questions}),
        "annotations": dump(root / "annotations.json", {"annotations": annotations}),
        "images": root / "val2014",
    }


def gqa(root: Path) -> Options:
    questions = {
        f"{n:08d}": {
            "question": "Is it red?",
            "imageId": str(n // 2),
            "answer": "yes",
            "isBalanced": n != 1,
            "types": {"structural": ("verify", "query")[n % 2]},
        }
        for n in range(2 * IMAGES)
    }
    for n in range(IMAGES):
        draw(root / "images", f"{n}.jpg", n)
    path = dump(root / "testdev_balanced_questions.json", questions)
    return {"questions": path, "images": root / "images"}


def vizwiz(root: Path) -> Options:
    entries = [
        {
            "image": draw(root / "val", f"VizWiz_val_{n:08d}.jpg", n),
            "question": "What is this?",
            "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}] * 8
            + [{"answer": "soup", "answer_confidence": "no"}] * 2,
            "answer_type": "unanswerable",
            "answerable": 0,
        }
        for n in range(IMAGES)
    ]
    return {"annotations": dump(root / "val.json", entries), "images": root / "val"}


def karpathy(root: Path) -> Options:
    images = [
        {
            "filepath": "val2014",
            "filename": Path(draw(root / "images", f"val2014/COCO_{n}.jpg", n)).name,
            "cocoid": n,
            "split": "test" if n < IMAGES else "train",
            "sentences": [
                {"raw": f"A dog number {n}{end}"} for end in (".", " runs on grass.", " with a ball")
            ],
        }
        for n in range(IMAGES + 1)
    ]
    path = dump(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return {"annotations": path, "images": root / "images"}


def vqa(root: Path) -> Options:
    rows = []
    for n in range(IMAGES):
        image = draw(root / "images", f"{n}.jpg", n)
        rows.append({"image": image, "question": "Is it red?", "answer": "yes", "answer_type": "CLOSED "})
        rows.append({"image": image, "question": "What is it?", "answer": "The left lung"})
    return {"path": dump(root / "questions.json", rows), "images": root / "images"}


def mcq(root: Path) -> Options:
    rows = [
        {
            "image": draw(root / "images", f"{n}.jpg", n),
            "question": "What is it?",
            **dict(zip("ABC", ("a dog", "a cat", "an ox"), strict=True)),
            "answer": "ABC"[n % 3],
        }
        for n in range(IMAGES)
    ]
    return {"path": dump(root / "questions.json", rows), "images": root / "images"}


def yes_no(root: Path) -> Options:
    rows = [
        {
            "image": draw(root / "images", f"{n // 2}.jpg", n // 2),
            "question": "Is it red?",
            "answer": ("Yes", "No")[n % 2],
        }
        for n in range(2 * IMAGES)
    ]
    return {"path": dump(root / "questions.json", rows), "images": root / "images"}


def classify(root: Path) -> Options:
    rows = [
        {"image": draw(root / "images", f"{n}.jpg", n), "label": ("ring", "star", "cross")[n % 3]}
        for n in range(IMAGES)
    ]
    return {"path": dump(root / "dataset.json", rows), "images": root / "images"}


def caption_table(root: Path) -> Options:
    rows = [
        {
            "image": draw(root / "images", f"{n // 2}.jpg", n // 2),
            "caption": f"a dog number {n} runs on grass",
        }
        for n in range(2 * IMAGES)
    ]
    return {"path": dump(root / "dataset.json", rows), "images": root / "images"}


WRITERS: dict[str, Callable[[Path], Options]] = {
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "mm_vet": mm_vet,
    "seed_bench": seed_bench,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "vqav2": vqav2,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "captions": karpathy,
    "retrieval": karpathy,
    "vqa": vqa,
    "mcq": mcq,
    "yes_no": yes_no,
    "classify": classify,
    "caption_table": caption_table,
}
