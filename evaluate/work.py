"""What a benchmark asks a run: its questions, each with the key that its answer is saved under.

What was asked is saved beside the answers, so that scoring and comparing need neither caches nor models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcmp.evaluate.benchmarks.base import BENCHMARKS, AskedItem, Benchmark, Item
from fedcmp.evaluate.official.files import Problem
from fedcmp.evaluate.overlap import trained_on
from fedcmp.pipeline.cache import FeatureCache, open_cache
from fedcmp.pipeline.cache.format import QUANT_ARRAYS, shard_name
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.files import read_json, write_json
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.plugins import blamed

FORMAT = {"name": "fedcmp-asked", "version": 2}


@dataclass(frozen=True)
class Work:
    """One benchmark of one run.

    Attributes:
        name: The benchmark's name in the configuration.
        benchmark: Its options and rules.
        items: What is asked.
        keys: Hash of all that decides an item's answer besides the model, by the item's id.
        missing: Images without features, a name for every item about one. Neither these items nor the next
            two kinds are asked or scored.
        duplicates: Items whose id came before.
        problems: Entries of the files that cannot be asked.
        trained: Images asked about that the run was trained on.
        limit: How many of the questions were taken, the first ones, where that is not all.
    """

    name: str
    benchmark: Benchmark
    items: list[Item]
    keys: dict[str, str]
    missing: list[str]
    duplicates: int
    problems: list[str]
    trained: int
    limit: int | None = None


def benchmarks_of(experiment: Experiment, only: tuple[str, ...] = ()) -> dict[str, Benchmark]:
    """The configured benchmarks, by name.

    Raises:
        UserError: None is configured, or a name is unknown.
    """
    components = experiment.evaluate.benchmarks
    if not components:
        raise UserError("evaluate.benchmarks is empty; add a table [evaluate.benchmarks.NAME]")
    for name in only:
        if name not in components:
            raise UserError(f"--benchmark {name}: not configured{did_you_mean(name, components)}")
    return {
        name: BENCHMARKS.build(component, f"evaluate.benchmarks.{name}")
        for name, component in components.items()
        if not only or name in only
    }


def cache_of(experiment: Experiment, name: str, benchmark: Benchmark) -> FeatureCache:
    """The features of a benchmark's images: the silo it names, else its own, else that of all benchmarks.

    Raises:
        UserError: There are none.
    """
    own = name if experiment.cache_path(name).exists() else None
    silo = benchmark.silo or own or experiment.evaluate.silo
    if silo is None:
        raise UserError(
            f"benchmark '{name}' has no cached images; extract them: fedcmp extract CONFIG "
            f"--benchmark {name} --images FOLDER"
        )
    return open_cache(experiment, silo)


def prepare(
    experiment: Experiment, name: str, benchmark: Benchmark, cache: FeatureCache, limit: int | None = None
) -> Work:
    """Read a benchmark's files, match its images with the cache, and save what is asked.

    Args:
        experiment: The run.
        name: The benchmark's name.
        benchmark: Its options and rules.
        cache: Features of its images.
        limit: Take only so many questions, the first in the order of the files.

    Raises:
        UserError: There is nothing to ask, no image has features, or words would not be said.
    """
    contents = _contents(cache)
    _require_place(experiment, name, benchmark)
    items, duplicates, problems = _questions(name, benchmark, cache)
    if limit is not None and limit >= len(items):
        limit = None
    items = items[:limit]
    asked = [item for item in items if item.image in contents]
    if not asked:
        raise UserError(
            f"benchmark '{name}': none of its images (first: '{items[0].image}') is in {cache.path}; "
            f"extract them: fedcmp extract CONFIG --benchmark {name} --images FOLDER"
        )
    keys = _keys(experiment, benchmark, asked, contents)
    trained = trained_on(experiment, cache, {item.image for item in asked})
    record = {
        "format": FORMAT,
        "trained": trained,
        "features": {item.image: contents.get(item.image) for item in items},
        "texts": [[item.id, item.image, item.digest] for item in asked] if benchmark.asks_cache else None,
    } | ({} if limit is None else {"limit": limit})
    path = _asked_path(experiment, name)
    if read_json(path) != record:
        write_json(path, record)
    missing = [item.image for item in items if item.image not in contents]
    return Work(name, benchmark, asked, keys, missing, duplicates, problems, trained, limit)


def recall(experiment: Experiment, name: str, benchmark: Benchmark) -> Work:
    """What was asked, from the benchmark's files and what `prepare` saved.

    Raises:
        UserError: It was not asked yet, or a cache that is here has other features than those asked about.
    """
    place = f"{experiment.run}, {name}"
    record = read_json(_asked_path(experiment, name))
    if record is None or record.get("format") != FORMAT:
        raise UserError(f"{place}: not asked yet, its answers are missing; run 'fedcmp evaluate' first")
    contents: dict[str, str | None] = record["features"]
    limit: int | None = record.get("limit")
    cache = _cache_here(experiment, name, benchmark)
    if cache is not None:
        here = _contents(cache)
        changed = [image for image, content in contents.items() if here.get(image) != content]
        if changed:
            raise UserError(
                f"{place}: {len(changed)} images (first: '{changed[0]}') have other features in {cache.path} "
                "than were asked about; run 'fedcmp evaluate' again"
            )
    known = {image: content for image, content in contents.items() if content is not None}
    if record["texts"] is not None and cache is None:
        items: list[Item] = [AskedItem(*entry) for entry in record["texts"]]
        duplicates, problems = 0, list[str]()
    else:
        items, duplicates, problems = _questions(name, benchmark, cache)
        items = items[:limit]
    never = [item.image for item in items if item.image not in contents]
    if never:
        raise UserError(
            f"{place}: {len(never)} questions were not asked yet, their answers are missing (first image: "
            f"'{never[0]}'); run 'fedcmp evaluate' again"
        )
    asked = [item for item in items if item.image in known]
    keys = _keys(experiment, benchmark, asked, known)
    missing = [item.image for item in items if item.image not in known]
    return Work(name, benchmark, asked, keys, missing, duplicates, problems, record["trained"], limit)


def rows_of(cache: FeatureCache) -> dict[str, int]:
    """The row of every image that has features."""
    return {image: row for row, image in enumerate(cache.ids) if cache.status[row] == 0}


def _require_place(experiment: Experiment, name: str, benchmark: Benchmark) -> None:
    """Refuse words that the prompt template would leave out.

    Raises:
        UserError: Naming the option and the template.
    """
    if benchmark.own_words and benchmark.asks == "caption" and experiment.language.template == "plain":
        raise UserError(
            f"evaluate.benchmarks.{name}.{benchmark.own_words[0]}: language.template = 'plain' shows the "
            "picture alone and says nothing; set language.template to 'chat' or 'v1', or remove the option"
        )


def _asked_path(experiment: Experiment, name: str) -> Path:
    return experiment.scores_path / "asked" / f"{name}.json"


def _cache_here(experiment: Experiment, name: str, benchmark: Benchmark) -> FeatureCache | None:
    """The cache where it lies on this machine; nothing is fetched."""
    local = experiment.model_copy(update={"store": None})
    silo = benchmark.silo or (name if local.cache_path(name).exists() else experiment.evaluate.silo)
    if silo is None:
        return None
    path = local.cache_path(silo)
    packed = path.with_name(f"{path.name}.zip")
    return cache_of(local, name, benchmark) if path.exists() or packed.is_file() else None


def _contents(cache: FeatureCache) -> dict[str, str]:
    """A hash of every image's features: of the shard that has them, the place in it, and what they mean."""
    files = cache.manifest["files"]
    quantiser = [files[name] for name in sorted(files) if name.startswith(tuple(QUANT_ARRAYS))]
    meaning = [cache.manifest["dtype"], cache.patches, cache.d_vision, quantiser]
    places = {image: divmod(row, cache.manifest["shard_images"]) for image, row in rows_of(cache).items()}
    return {
        image: fingerprint([meaning, files[shard_name(shard)][1], place])
        for image, (shard, place) in places.items()
    }


def _questions(
    name: str, benchmark: Benchmark, cache: FeatureCache | None
) -> tuple[list[Item], int, list[str]]:
    """Items with an id of their own, the number of those without, and why others cannot be asked."""
    try:
        with blamed(benchmark, f"benchmark '{name}'"):
            found = list(benchmark.items(cache))
    except OSError as error:
        raise UserError(f"benchmark '{name}': {error.filename}: {error.strerror}; correct its path") from None
    problems = [each.reason for each in found if isinstance(each, Problem)]
    listed = [benchmark.worded(each) for each in found if isinstance(each, Item)]
    if not listed:
        why = f"; {problems[0]}" if problems else ""
        raise UserError(f"benchmark '{name}': its files hold no question{why}")
    unique: dict[str, Item] = {}
    for item in listed:
        unique.setdefault(item.id, item)
    return list(unique.values()), len(listed) - len(unique), problems


def _keys(
    experiment: Experiment, benchmark: Benchmark, items: Sequence[Item], contents: Mapping[str, str]
) -> dict[str, str]:
    """A hash of everything about an item that decides its answer, by its id."""
    language, mode = experiment.language, benchmark.mode
    settings: dict[str, object] = {
        "mode": mode,
        "template": language.template if benchmark.asks == "caption" else language.question_template,
        "max_length": language.max_length,
        "max_new_tokens": benchmark.max_new_tokens if mode == "generate" else None,
    }
    if benchmark.stop:
        settings["stop"] = benchmark.stop
    alone: dict[str, list[object]] = {}
    for item in items:
        alone[item.id] = [contents[item.image], item.digest]
        if mode in ("rank", "weigh"):
            alone[item.id] += item.options
        elif mode == "retrieve":
            alone[item.id] += [item.id, item.label]
    if mode == "retrieve":
        # What is retrieved depends on all the rest.
        settings["among"] = fingerprint(list(alone.values()))
    return {name: fingerprint([settings, *each]) for name, each in alone.items()}
