"""lmms-eval asks a run its tasks about cached features: `python -m lmms_eval --model fedcmp`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from fedcmp.components import load
from fedcmp.evaluate.answering import Failure, answers, cut, load_reader
from fedcmp.evaluate.benchmarks.base import Item
from fedcmp.evaluate.trained import trained_run
from fedcmp.lmms.lookup import Lookup
from fedcmp.pipeline.cache import open_cache
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.records import Text, Turn

_LENGTH = 1024  # as lmms-eval's own models where a task says nothing


class CachedRun(lmms):  # type: ignore[misc]
    """A run in lmms-eval; pictures are looked up in a cache and never decoded.

    Args:
        config: The run's experiment file.
        silo: The cache with the pictures: a silo, or a benchmark for which they were extracted.
        image_name: How a document's fields become the name that the cache knows; see `Lookup`.
        projector: Which of the run's projectors, where it has several.
        batch_size: Prompts at a time; `auto` is `evaluate.batch_size`.
        device: Instead of the experiment's.
        max_batch_size: Given by lmms-eval; no meaning here.
    """

    def __init__(
        self,
        config: str,
        silo: str,
        image_name: str = "{image}",
        projector: str | None = None,
        batch_size: int | str = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        experiment = load(Path(config), [f"device={device}"] if device else [])
        run = trained_run(experiment)
        names = run.judged
        name = projector or (names[0] if len(names) == 1 else "")
        if name not in run.projectors:
            raise UserError(f"model_args: projector={name}{did_you_mean(name, names)}")
        cache = open_cache(experiment, silo)
        run.require_encoding(cache)
        reader = load_reader(experiment, run, name, cache)
        self._reader = reader if batch_size == "auto" else replace(reader, batch_size=int(batch_size))
        self._pictures = Lookup(cache, image_name)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy answers, cut at the task's stop strings; a prompt that does not fit gets an empty one.

        Raises:
            UserError: A picture is not in the cache, or a task wants anything but greedy decoding.
        """
        by_length: dict[int, list[Item]] = defaultdict(list)
        for place, request in enumerate(requests):
            context, options, _, number, task, split = request.args
            if options.get("temperature") or (options.get("num_beams") or 1) > 1:
                raise UserError(f"task {task}: not greedy; add --gen_kwargs temperature=0,num_beams=1")
            # Other formats decode the pictures.
            (document,) = self.task_dict[task][split].with_format("arrow")[number].to_pylist()
            image = self._pictures.find(document, f"task {task}, document {number}")
            item = Item(str(place), image, Text((Turn("user", context),)))
            by_length[options.get("max_new_tokens") or _LENGTH].append(item)
        said = [""] * len(requests)
        reader, rows = self._reader, self._pictures.rows
        for length, items in by_length.items():
            for batch in answers(reader, items, rows, asks="question", mode="generate", length=length):
                for item, answer in batch:
                    if isinstance(answer, Failure):
                        say(f"not answered: {item.text.turns[0].content[:60]!r}: {answer.reason}")
                    else:
                        until = requests[int(item.id)].args[1].get("until") or []
                        stop = [until] if isinstance(until, str) else until
                        said[int(item.id)] = cut(str(answer), stop).strip()
        return said

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        """Not offered, and neither are several rounds."""
        raise UserError("only tasks of one generated answer; for likelihoods a benchmark has 'rank = true'")

    generate_until_multi_round = loglikelihood


def plugin() -> Any:
    """How lmms-eval gets to know the model: its entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # which calls this when it is imported

    return ModelManifest("fedcmp", simple_class_path=f"{__name__}.{CachedRun.__name__}")
