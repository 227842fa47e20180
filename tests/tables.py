"""Tiny files in the layouts of the data sets that docs/tables.md names, in a folder that stands for /data."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import picture
from official import draw, dump

NUMBER = 4
Rows = Sequence[dict[str, Any]]


def parquet(path: Path, rows: Rows) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=3)
    return path


def shards(folder: Path, split: str, rows: Rows) -> None:
    """Two files as Hugging Face names them."""
    half = (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        parquet(folder / f"{split}-{number:05d}-of-00002.parquet", part)


def separated(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
        writer = csv.DictWriter(file, list(rows[0]), dialect=dialect)
        writer.writeheader()
        writer.writerows(rows)
    return path


def struct(seed: int, form: str = "png") -> dict[str, Any]:
    """A picture as Hugging Face stores it."""
    return {"bytes": picture(seed, form=form), "path": f"{seed}.{form}"}


def coded(seed: int) -> str:
    return base64.b64encode(picture(seed, form="jpeg")).decode()


def vqa_rad(data: Path) -> None:
    rows = []
    for n in range(NUMBER):
        name = draw(data / "vqa_rad/VQA_RAD Image Folder", f"synpic{n}.jpg", n)
        common = {"image_name": name, "image_organ": ("HEAD", "CHEST")[n % 2], "evaluation": "not evaluated"}
        rows += [
            common
            | {
                "qid": str(2 * n),
                "phrase_type": ("test_freeform", "test_para")[n % 2],
                "question": "Is there a mass?",
                "answer": ("Yes", "No")[n % 2],
                "answer_type": ("CLOSED", "CLOSED ")[n % 2],
            },
            common
            | {
                "qid": str(2 * n + 1),
                "phrase_type": "test_freeform",
                "question": "How many lesions?",
                "answer": 1 + n,
                "answer_type": "OPEN",
            },
            common
            | {
                "qid": str(100 + n),
                "phrase_type": "freeform",
                "question": "Where?",
                "answer": "left",
                "answer_type": "OPEN",
            },
        ]
    dump(data / "vqa_rad/VQA_RAD Dataset Public.json", rows)


def slake(data: Path) -> None:
    rows = []
    for n in range(NUMBER):
        name = draw(data / "Slake1.0/imgs", f"xmlab{n}/source.jpg", n)
        common = {"img_id": n, "img_name": name, "location": "Lung", "modality": ("CT", "MRI")[n % 2]}
        common |= {"base_type": "vqa", "triple": ["vhead", "_", "_"]}
        for k, (asked, answer, kind, content) in enumerate(
            (
                ("What is the main organ?", "Lung, Spinal Cord", "OPEN", "Organ"),
                ("Does the picture contain lung?", "Yes", "CLOSED", "Organ"),
                ("Which is the biggest, lung or heart?", "Lung", "CLOSED", "Size"),
            )
        ):
            rows.append(
                common
                | {"question": asked, "answer": answer, "answer_type": kind, "content_type": content}
                | {"q_lang": "en", "qid": 3 * n + k}
            )
        rows.append(
            common
            | {
                "question": "\u4ec0\u4e48?",
                "answer": "\u80ba",
                "answer_type": "OPEN",
                "content_type": "Organ",
            }
            | {"q_lang": "zh", "qid": 900 + n}
        )
    dump(data / "Slake1.0/test.json", rows)


def pathvqa(data: Path) -> None:
    rows = []
    for n in range(NUMBER):
        rows.append({"image": struct(n), "question": "is it necrosis?", "answer": ("yes", "no")[n % 2]})
        rows.append({"image": struct(n), "question": "what is present?", "answer": "liver tissue"})
    shards(data / "path-vqa/data", "test", rows)


def pmc_vqa(data: Path) -> None:
    options = ("Hepatocytes", "Renal, proximal tubules", "Neurons", "Muscle")
    rows = [
        {
            "index": n,
            "Figure_path": draw(data / "PMC-VQA/figures", f"PMC{n}_F1.jpg", n),
            "Caption": 'A figure, "stained"',
            "Question": " What is shown? ",
            **{f"Choice {k}": f" {k}:{each} " for k, each in zip("ABCD", options, strict=True)},
            "Answer": "ABCD"[n % 4],
            "split": "test",
        }
        for n in range(NUMBER)
    ]
    separated(data / "PMC-VQA/test_2.csv", rows)


def mmstar(data: Path) -> None:
    rows = [
        {
            "index": n,
            "question": "Which?\nOptions: A: a dog, B: a cat, C: an ox, D: a hen",
            "image": picture(n, form="jpeg"),
            "answer": "ABCD"[n % 4],
            "category": ("math", "coarse perception")[n % 2],
            "l2_category": ("geometry", "image emotion")[n % 2],
            "meta_info": {"source": "AI2D", "split": "test", "image_path": "images/1.jpg"},
        }
        for n in range(NUMBER)
    ]
    parquet(data / "MMStar/mmstar.parquet", rows)


def mmstar_tsv(data: Path) -> None:
    rows = [
        {
            "index": n,
            "question": 'Which\tof "these"?',
            "hint": ("", "nan", "two words")[n % 3],
            **dict(zip("ABCD", ("a dog", "a cat", "an ox", "" if n else "a hen"), strict=True)),
            "answer": "ABC"[n % 3],
            "category": ("math", "coarse perception")[n % 2],
            "l2-category": ("geometry", "image emotion")[n % 2],
            # Every other row names the one before, which has the picture.
            "image": coded(n) if n % 2 == 0 else str(n - 1),
        }
        for n in range(NUMBER)
    ]
    separated(data / "LMUData/MMStar.tsv", rows)


def ai2d(data: Path) -> None:
    rows = [
        {
            "question": "Which number?",
            "options": ["1", "2", "3", "0"],
            "answer": str(n % 4),
            "image": struct(n),
        }
        for n in range(NUMBER)
    ]
    shards(data / "ai2d/data", "test", rows)


def realworldqa(data: Path) -> None:
    asked = "Which way?\n\nA. Left\nB. Right\n\nPlease answer directly with only the letter of the option."
    rows = [
        {
            "question": (asked, "How many cars? Please answer directly with a single word or number.")[n % 2],
            "answer": ("A", "2")[n % 2],
            "image": struct(n, "webp"),
            "image_path": f"{n}.webp",
        }
        for n in range(NUMBER)
    ]
    shards(data / "RealWorldQA/data", "test", rows)


def hallusionbench(data: Path) -> None:
    """Two figures a set and two questions about each; in VS the first has no picture."""
    rows = []
    for category, subcategory in (("VD", "illusion"), ("VS", "chart")):
        for figure in range(2):
            name = f"hallusion_bench/{category}/{subcategory}/0_{figure}.png"
            for number in range(2):
                shown = category == "VD" or figure > 0
                entry = {"category": category, "subcategory": subcategory, "visual_input": str(int(shown))}
                entry |= {"set_id": "0", "figure_id": str(figure), "question_id": str(number)}
                entry |= {"question": "Is it larger?", "gt_answer": str((figure + number) % 2)}
                entry |= {"filename": f"./{draw(data / 'HallusionBench', name, figure)}" if shown else None}
                rows.append(entry)
    dump(data / "HallusionBench/HallusionBench.json", rows)


def okvqa(data: Path) -> None:
    questions, annotations = [], []
    for n in range(NUMBER):
        draw(data / "coco/val2014", f"COCO_val2014_{n:012d}.jpg", n)
        questions.append({"question_id": 10 * n, "image_id": n, "question": "What sport is it?"})
        words = ["surfing"] * 6 + ["surf"] * 4
        answers = [
            {"answer_id": k + 1, "raw_answer": word, "answer": word, "answer_confidence": "yes"}
            for k, word in enumerate(words)
        ]
        annotations.append(
            {"question_id": 10 * n, "image_id": n, "answers": answers, "answer_type": "other"}
            | {"question_type": "one", "confidence": 3}
        )
    dump(data / "okvqa/OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    dump(data / "okvqa/mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})


def aokvqa(data: Path) -> None:
    rows = []
    for n in range(NUMBER):
        draw(data / "coco/val2017", f"{n:012d}.jpg", n)
        rows.append(
            {
                "split": "val",
                "image_id": n,
                "question_id": f"q{n}",
                "question": "What is the man by?",
                "choices": ["boat", "train", "car", "bus"],
                "correct_choice_idx": n % 4,
                "direct_answers": ["boat"] * 2 + ["ship"] * 5 + ["sea", "water", "the sea"],
                "difficult_direct_answer": n == 3,
                "rationales": ["because"],
            }
        )
    dump(data / "aokvqa/aokvqa_v1p0_val.json", rows)


def nocaps(data: Path) -> None:
    images, annotations = [], []
    for n in range(2 * NUMBER):
        name = draw(data / "nocaps/val", f"{n:016x}.jpg", n)
        domain = ("in-domain", "near-domain", "out-domain")[min(n // 3, 2)]
        images.append({"id": n, "file_name": name, "domain": domain, "open_images_id": f"{n:016x}"})
        annotations += [
            {"id": 10 * n + k, "image_id": n, "caption": f"A {word} number {n} {end}"}
            for k, (word, end) in enumerate((("dog", "runs on grass"), ("hound", "is running")))
        ]
    dump(
        data / "nocaps/nocaps_val_4500_captions.json",
        {"images": images, "annotations": annotations, "licenses": [], "info": {}},
    )


def reports(data: Path) -> None:
    rows = [
        {
            "uid": n // 2,
            "filename": draw(data / "reports/images", f"{n // 2}.png", n // 2),
            "findings": ("The heart is normal.\nNo effusion.", f"Normal heart, no effusion, {n}")[n % 2],
        }
        for n in range(2 * NUMBER)
    ]
    separated(data / "reports/test.csv", rows)


def pneumonia(data: Path) -> None:
    shards(data / "pneumonia", "test", [{"image": struct(n), "label": n % 2} for n in range(NUMBER)])


def pope(data: Path) -> None:
    rows = [
        {
            "id": str(n),
            "question_id": str(n % NUMBER + 1),
            "question": "Is there a dog in the image?",
            "answer": ("yes", "no")[n % 2],
            "image_source": f"COCO_val2014_{n // 2 % 2:012d}",
            "image": struct(n // 2 % 2, "jpeg"),
            "category": ("adversarial", "popular", "random")[n // NUMBER],
        }
        for n in range(3 * NUMBER)
    ]
    shards(data / "POPE/data", "test", rows)


def mme(data: Path) -> None:
    from fedcmp.evaluate.benchmarks.mme import COGNITION, PERCEPTION

    rows = [
        {
            "question_id": f"{category}/{n:04d}.png",
            "image": struct(n),
            "question": f"Is this a {what}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category in (*PERCEPTION, *COGNITION)
        for n in range(2)
        for what, answer in (("dog", "Yes"), ("cat", "No"))
    ]
    shards(data / "MME/data", "test", rows)


def mmbench(data: Path) -> None:
    rows = []
    for n in range(2):
        options = ["a red bus", "a blue car", "nan", "nan"]
        for turn in range(2):
            rows.append(
                {
                    "index": n + turn * 1_000_000,
                    "question": "What is it?",
                    "hint": ("nan", "the picture shows a street")[n],
                    "answer": "AB"[turn],
                    **dict(zip("ABCD", [*options[turn:2], *options[:turn], *options[2:]], strict=True)),
                    "category": "recognition",
                    "image": struct(n, "jpeg"),
                    "source": "own",
                    "L2-category": "coarse",
                    "comment": "nan",
                    "split": "dev",
                }
            )
    shards(data / "MMBench/en", "dev", rows)


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqa_rad": vqa_rad,
    "slake": slake,
    "pathvqa": pathvqa,
    "pmc_vqa": pmc_vqa,
    "mmstar": mmstar,
    "mmstar_tsv": mmstar_tsv,
    "ai2d": ai2d,
    "realworldqa": realworldqa,
    "hallusionbench": hallusionbench,
    "okvqa": okvqa,
    "aokvqa": aokvqa,
    "aokvqa_choice": aokvqa,
    "nocaps": nocaps,
    "reports": reports,
    "pneumonia": pneumonia,
    "pope_parquet": pope,
    "mme_parquet": mme,
    "mmbench_parquet": mmbench,
}
