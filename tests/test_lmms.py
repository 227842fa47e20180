"""lmms-eval's own command asks a run what `fedcmp evaluate` asks, and gets the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_evaluate import answers_file, call, lines_of

from fedcmp.lmms.lookup import Lookup
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.projector import save_projector

needs_lmms = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs the extra [lmms]")

RUN = """
extends = "experiment.toml"
[federate]
rounds = 0
initial = "{initial}"
[evaluate.benchmarks.pope]
max_new_tokens = 6
"""
TASK = """
task: tiny
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: label
generation_kwargs: {{max_new_tokens: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
VISUAL = """
def visual(document):
    raise AssertionError("pictures are not decoded")
"""


@pytest.fixture(scope="module")
def run(extracted: Path) -> Path:
    """The experiment file of a run that has answered POPE."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear_1": (32, 24), "linear_2": (32, 32)}
    # Without biases even a random LLM says other things of other pictures.
    state = {f"{layer}.weight": torch.randn(shape, generator=generator) for layer, shape in shapes.items()}
    state |= {f"{layer}.bias": torch.zeros(32) for layer in shapes}
    save_projector(extracted.with_name("initial.safetensors"), state, "mlp2x_gelu")
    config = extracted.with_name("run.toml")
    config.write_text(RUN.format(initial=extracted.with_name("initial.safetensors")))
    for command, more in (("federate", ()), ("evaluate", ("--benchmark", "pope"))):
        result = call(command, config, more=more)
        assert result.exit_code == 0, result.output
    return config


@pytest.fixture(scope="module")
def documents(run: Path) -> list[dict[str, Any]]:
    """POPE's questions as a data set of lmms-eval has them: with pictures."""
    lines = [json.loads(line) for line in (run.parent / "pope.json").read_text().splitlines()]
    asked = "\nAnswer the question using a single word or phrase."
    return [
        {
            "id": line["question_id"],
            "question": line["text"] + asked,
            "label": line["label"],
            "source": Path(line["image"]).stem,
            "image": {"bytes": (run.parent / "heldout" / line["image"]).read_bytes(), "path": None},
        }
        for line in lines
    ]


def dataset(documents: list[dict[str, Any]]) -> Any:
    import datasets

    features = {name: datasets.Value("string") for name in ("question", "label", "source")}
    features |= {"id": datasets.Value("int64"), "image": datasets.Image()}
    return datasets.Dataset.from_list(documents, features=datasets.Features(features))


def ours(run: Path) -> list[str]:
    """What `fedcmp evaluate` saved, in the order of the questions."""
    lines = lines_of(answers_file(run, "run"), "pope")
    saved = {entry["id"]: entry["answer"] for entry in lines}
    return [saved[f"random/{number}"] for number in range(len(saved))]


@needs_lmms
def test_its_command_gets_the_answers_of_evaluate(
    run: Path, documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = tmp_path / "questions.parquet"
    dataset(documents).to_parquet(data)
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    (tmp_path / "utils.py").write_text(VISUAL)
    words = f"--model fedcmp --model_args config={run},silo=heldout --batch_size 5 --tasks tiny"
    words += f" --include_path {tmp_path} --log_samples --output_path {tmp_path}/logs"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lmms_eval", *words.split()]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (samples,) = (tmp_path / "logs").rglob("*_samples_tiny.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    said = [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    assert said == ours(run)
    assert len(set(said)) > 3


def ask(run: Path, documents: list[dict[str, Any]], options: dict[str, Any], **model: Any) -> list[str]:
    """Ask as lmms-eval does, in this process."""
    from lmms_eval.api.instance import Instance

    from fedcmp.lmms.model import CachedRun

    cached = CachedRun(str(run), silo="heldout", **model)
    cached.task_dict = {"tiny": {"test": dataset(documents)}}
    requests = []
    for number, document in enumerate(documents):
        metadata = {"task": "tiny", "doc_id": number, "repeats": 1}
        arguments = (document["question"], options, None, number, "tiny", "test")
        requests.append(Instance("generate_until", arguments, 0, metadata))
    return cached.generate_until(requests)


@needs_lmms
@pytest.mark.filterwarnings("ignore")
def test_names_stops_and_lengths(run: Path, documents: list[dict[str, Any]]) -> None:
    expected = ours(run)
    assert ask(run, documents, {"max_new_tokens": 6}, image_name="scans/{source}.png") == expected
    stop = expected[0].split()[1]
    cut = [answer.split(stop)[0].strip() for answer in expected]
    assert ask(run, documents, {"max_new_tokens": 6, "until": ["none", stop]}, batch_size=7) == cut
    long = [{**documents[0], "question": "What? " * 3000}, documents[1]]
    assert ask(run, long, {"max_new_tokens": 6}) == ["", expected[1]]


@needs_lmms
@pytest.mark.filterwarnings("ignore")
def test_what_it_cannot_do_is_refused(run: Path, documents: list[dict[str, Any]]) -> None:
    for options, model, message in (
        ({"temperature": 0.7}, {}, "task tiny: not greedy; add --gen_kwargs temperature=0"),
        ({"num_beams": 3}, {}, "task tiny: not greedy"),
        ({}, {"projector": "projektor.safetensors"}, "did you mean 'projector.safetensors'"),
        ({}, {"image_name": "{source}.jpg"}, "task tiny, document 0: no features of '500.jpg' in"),
    ):
        with pytest.raises(UserError, match=message):
            ask(run, documents, options, **model)


def test_pictures_are_found_by_name_or_content(extracted: Path, tmp_path: Path) -> None:
    cache = FeatureCache(extracted.parent / "features/heldout.zarr")
    file = extracted.parent / "heldout/scans/503.png"
    data = {"bytes": file.read_bytes(), "path": "elsewhere.png"}
    for image_name, document in (
        ("{image}", {"image": "scans/503.png"}),
        ("scans/{number:03d}.png", {"number": 503, "image": None}),
        ("{image}", {"image": data}),
        ("{picture}", {"picture": [data]}),
        ("{image}", {"image": {"bytes": None, "path": str(file)}}),
    ):
        pictures = Lookup(cache, image_name)
        assert cache.ids[pictures.rows[pictures.find(document, "here")]] == "scans/503.png"
    for image_name, document, message in (
        ("{image}", {"image": "503.png"}, "document 7: no features of '503.png' in .*its fields: image"),
        ("{image}", {"image": [data, data]}, "document 7: no features of"),
        ("{name}", {"image": data}, "document 7: image_name={name} does not fit: 'name'; its fields: image"),
        ("{image:03d}", {"image": "x"}, "document 7: image_name={image:03d} does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            Lookup(cache, image_name).find(document, "document 7")
