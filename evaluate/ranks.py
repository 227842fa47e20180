"""Answering over the processes that torchrun started: rank 0 says what, and each answers its batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from fedcmp.evaluate.answering import answer, load_reader
from fedcmp.evaluate.answers import answers_path, begin_answers, join_parts, part_path
from fedcmp.evaluate.benchmarks.base import Item
from fedcmp.evaluate.scoring import model_of
from fedcmp.evaluate.trained import trained_run
from fedcmp.evaluate.work import Work, benchmarks_of, cache_of, prepare
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.ranks import Ranks
from fedcmp.pipeline.run_folder import Run


def answer_together(
    experiment: Experiment,
    run: Run,
    projector: str,
    work: Work,
    cache: FeatureCache,
    items: Sequence[Item],
    path: Path,
    advance: Callable[[int], None],
    ranks: Ranks,
) -> None:
    """Answer items of a benchmark with all ranks; the file then has the lines that one process writes."""
    model = model_of(run, projector)
    keys = [work.keys[item.id] for item in items]
    ranks.tell(
        {
            "place": str(experiment.scores_path),
            "projector": projector,
            "benchmark": work.name,
            "limit": work.limit,
            "items": [item.id for item in items],
            "keys": fingerprint([model, keys]),
        }
    )
    left = len(items)

    def ahead(number: int) -> None:
        """The others are as far as this process."""
        nonlocal left
        done = min(number * ranks.count, left)
        left -= done
        advance(done)

    with ranks.at_work():
        part = part_path(path, 0)
        begin_answers(part, model)
        answer(work, items, load_reader(experiment, run, projector, cache), part, ahead, ranks.place)
        ranks.answers()
    join_parts(path, model)
    advance(left)


def follow(load: Callable[[], Sequence[Experiment]], ranks: Ranks) -> None:
    """Answer what rank 0 asks for, until it ends.

    Raises:
        UserError: The files here are not those of rank 0.
    """
    experiments: dict[str, Experiment] = {}
    works: dict[tuple[str, str], tuple[Work, FeatureCache]] = {}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        while (message := ranks.told()) is not None:
            asked = message[0]
            with ranks.at_work():
                experiments = experiments or {str(each.scores_path): each for each in load()}
                experiment = experiments[asked["place"]]
                run = trained_run(experiment)
                place = asked["place"], asked["benchmark"]
                if place not in works:
                    works = {place: _work(experiment, asked["benchmark"], asked["limit"])}
                _answer(experiment, run, *works[place], asked, ranks)
                ranks.tell({"done": True})


def _work(experiment: Experiment, name: str, limit: int | None) -> tuple[Work, FeatureCache]:
    benchmark = benchmarks_of(experiment)[name]
    cache = cache_of(experiment, name, benchmark)
    return prepare(experiment, name, benchmark, cache, limit), cache


def _answer(
    experiment: Experiment, run: Run, work: Work, cache: FeatureCache, asked: dict[str, Any], ranks: Ranks
) -> None:
    model = model_of(run, asked["projector"])
    of = {item.id: item for item in work.items}
    items = [of[name] for name in asked["items"] if name in of]
    if fingerprint([model, [work.keys[item.id] for item in items]]) != asked["keys"]:
        raise UserError(
            f"{experiment.run}, {work.name}: other questions, features or projector than rank 0 has; give "
            "all ranks the same files"
        )
    part = part_path(answers_path(experiment.scores_path, asked["projector"], model), ranks.rank)
    begin_answers(part, model)
    reader = load_reader(experiment, run, asked["projector"], cache)
    answer(work, items, reader, part, lambda number: None, ranks.place)
