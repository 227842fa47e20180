"""Questions to show: every run's own errors, what runs disagree about, and what none got wrong."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from fedcmp.evaluate.benchmarks.base import LETTER, SHORT_ANSWER, Item
from fedcmp.evaluate.report.judged import Judged
from fedcmp.evaluate.report.results import Said, Sample, Totals
from fedcmp.pipeline.records import IMAGE_PLACEHOLDER

# Questions of each kind for every run and benchmark, fewer where the page would have more than `_MOST`.
_EACH, _FEWEST, _MOST = 24, 6, 480
_THUMBNAIL = 320
_SMALL_FILE = 30_000
_FORMATS = ("png", "jpeg", "gif", "webp")


@dataclass(frozen=True)
class Sampled:
    """Samples, how many questions there are of each kind, and the folders that have none of the pictures."""

    samples: list[Sample]
    totals: Totals
    no_pictures: list[Path]


def sampled(runs: Sequence[Judged]) -> Sampled:
    """Samples of every benchmark that is answered in words, with every run's answer."""
    names = [
        name
        for name in dict.fromkeys(name for run in runs for name in run.answered)
        if all(
            run.benchmarks[name].mode in ("generate", "rank", "weigh") for run in runs if name in run.answered
        )
    ]
    each = min(_EACH, max(_FEWEST, _MOST // max(len(names) * (len(runs) + 2), 1)))
    samples: list[Sample] = []
    totals: Totals = {}
    folders = []
    for name in names:
        asked = [run for run in runs if name in run.answered]
        benchmark = asked[0].benchmarks[name]
        items = [*dict.fromkeys(item for run in asked for item in run.answered[name].given.items)]
        verdicts = [_verdicts(run, name) for run in asked]
        kinds = _kinds(items, verdicts)
        totals[name] = _totals([run.result.name for run in asked], kinds)
        folder = benchmark.images or runs[0].experiment.evaluate.images
        if folder:
            folders.append(folder)
        for place in _chosen(kinds, len(items), each, runs[0].experiment.seed):
            item = items[place]
            said = [
                _said(run, name, item, verdict)
                for run, verdict in zip(asked, verdicts, strict=True)
                if item in verdict
            ]
            data, form = (thumbnail(folder, item.image) if folder else None) or (None, "")
            reference = benchmark.show_reference(item)
            samples.append(Sample(name, item.image, data, _asked(item), reference, said, form))
    none = samples and not any(sample.picture for sample in samples)
    return Sampled(samples, totals, list(dict.fromkeys(folders)) if none else [])


def _verdicts(run: Judged, name: str) -> dict[Item, bool | None]:
    """Whether a run is right, by the question; None where answers are not right or wrong."""
    given = run.answered[name].given
    points = run.benchmarks[name].points(given.items, given.answers[0])
    if points is None:
        return dict.fromkeys(given.items)
    return {item: worth >= 0.5 for item, worth in zip(given.items, points, strict=True)}


def _said(run: Judged, name: str, item: Item, verdicts: dict[Item, bool | None]) -> Said:
    given = run.answered[name].given
    answer = run.benchmarks[name].show_answer(item, given.answers[0][item.id])
    return Said(run.result.name, answer, verdicts[item], _whose(given.projectors))


def _whose(projectors: Sequence[str]) -> str:
    """Whose answers are shown of a run with several projectors: the first one's."""
    if len(projectors) == 1:
        return ""
    return f"silo {Path(projectors[0]).stem}, first of {len(projectors)}"


# Places of questions by run (its number; None for any) and verdict.
_Kinds = dict[tuple[int | None, str], list[int]]


def _kinds(items: Sequence[Item], verdicts: Sequence[dict[Item, bool | None]]) -> _Kinds:
    kinds: _Kinds = {}
    for run, verdict in enumerate(verdicts):
        for name, wanted in (("right", True), ("wrong", False)):
            kinds[run, name] = [place for place, item in enumerate(items) if verdict.get(item) is wanted]
    for name in ("right", "wrong"):
        kinds[None, name] = sorted({place for run in range(len(verdicts)) for place in kinds[run, name]})
    right, wrong = ({*kinds[None, name]} for name in ("right", "wrong"))
    kinds[None, "disagree"] = sorted(right & wrong)
    for run, verdict in enumerate(verdicts):
        asked = {place for place, item in enumerate(items) if item in verdict}
        kinds[run, "disagree"] = sorted(asked & right & wrong)
        kinds[run, ""] = sorted(asked)
    kinds[None, ""] = [*range(len(items))]
    return kinds


def _totals(names: Sequence[str], kinds: _Kinds) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {name: {} for name in ("", *names)}
    for (run, verdict), places in kinds.items():
        totals["" if run is None else names[run]][verdict] = len(places)
    return totals


def _chosen(kinds: _Kinds, number: int, each: int, seed: int) -> list[int]:
    """Places to show: up to `each` of every kind, drawn by one order so that runs share questions."""
    order = np.random.default_rng(seed).permutation(number).tolist()
    rank = {place: position for position, place in enumerate(order)}
    chosen = {
        place
        for (run, verdict), places in kinds.items()
        if (run is None and verdict == "disagree") or (run is not None and verdict == "wrong")
        for place in sorted(places, key=rank.__getitem__)[:each]
    }
    # Of each run also some that it got right, mostly there already.
    for (run, verdict), places in kinds.items():
        if run is not None and verdict == "right":
            lacking = each // 2 - len(chosen & {*places})
            rest = sorted({*places} - chosen, key=rank.__getitem__)
            chosen |= {*rest[: max(lacking, 0)]}
    return sorted(chosen or order[:each])


def _asked(item: Item) -> str:
    """The question as a person reads it, without the image's place and the standing instruction."""
    asked = item.text.turns[-1].content.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    return asked.removesuffix(SHORT_ANSWER).removesuffix(LETTER)


def thumbnail(folder: Path, name: str) -> tuple[bytes, str] | None:
    """A picture's file with its format, made small where it is large; None where it cannot be shown.

    Names may come from a partner's cache: only pictures are shown, and only such as lie in the folder.
    """
    place = PurePath(name)
    if place.is_absolute() or ".." in place.parts:
        return None
    try:
        data = (folder / place).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            small, form = image.convert("RGB"), str(image.format).lower()
        if len(data) <= _SMALL_FILE and form in _FORMATS:
            return data, form
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "jpeg", quality=80)
        return buffer.getvalue(), "jpeg"
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return None
