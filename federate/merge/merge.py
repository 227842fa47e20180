"""`fedcmp merge`: trained projectors in, one projector and its manifest out, without training."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fedcmp.federate.client.stream import Stream
from fedcmp.federate.client.texts import unusable
from fedcmp.federate.strategies.base import STRATEGIES, Aggregate, State, Strategy, Update, check
from fedcmp.pipeline import history
from fedcmp.pipeline.cache import FeatureCache, same_key
from fedcmp.pipeline.config import Component
from fedcmp.pipeline.console import progress, say, table
from fedcmp.pipeline.errors import UserError, did_you_mean
from fedcmp.pipeline.handover.receive import received
from fedcmp.pipeline.manifest import fingerprint, provenance, write_json
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.device import device_type, pick_device, pick_dtype
from fedcmp.pipeline.models.language import FrozenLanguageModel, load_language
from fedcmp.pipeline.models.projectors.base import Projector
from fedcmp.pipeline.models.saved_model import LANGUAGE_FILES, model_hashes

FORMAT = {"name": "fedcmp-merge", "version": 1}
_BATCH = 32
_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Guide:
    """What alignments are computed from.

    `features` are one cache a projector in order, or one for all; about `texts` training texts are
    taken from each.
    """

    features: tuple[Path, ...]
    language: Path
    template: str
    texts: int


@dataclass(frozen=True)
class Source:
    """One projector to merge; `samples` is what its history says, if there is one."""

    name: str
    path: Path
    architecture: str
    state: State
    samples: int | None


@dataclass(frozen=True)
class Inputs:
    """All that a method is given, and where it came from.

    `weighted_by` says where the updates' samples come from, `guided` what their alignments do.
    """

    sources: list[Source]
    base: State
    base_path: Path | None
    updates: list[Update]
    weighted_by: str
    guided: dict[str, Any] | None = None


def merge(
    paths: Sequence[Path],
    methods: Sequence[str],
    out: Path,
    *,
    base: Path | None = None,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    guide: Guide | None = None,
) -> list[Path]:
    """Merge projectors with each of several methods.

    Args:
        paths: Projector files, or directories of runs.
        methods: Names of strategies.
        out: A `.safetensors` file, or a folder that gets one file a method.
        base: The projector they were trained from; zero if None.
        weights: Samples of each projector, `n1,n2,...`.
        overrides: `option=value` for all methods, `method.option=value` for one.
        guide: What alignments are computed from, for methods that want them.

    Returns:
        The files written.

    Raises:
        UserError: A file, method, option or number is wrong.
    """
    strategies = {name: _method(name, overrides, methods) for name in methods}
    targets = _targets(out, list(strategies))
    inputs = _inputs(paths, base, weights)
    _refuse_overwriting(inputs, targets)
    wanting = [name for name, strategy in strategies.items() if "alignment" in strategy.wants]
    if guide and wanting:
        inputs = _aligned(inputs, guide)
    elif wanting:
        say(f"{', '.join(wanting)}: without --features and --language, alignments do not weight the layers")
    elif guide:
        say(f"--features and --language are not used: {', '.join(strategies)} takes no alignments")
    for name, strategy in strategies.items():
        _merge(name, strategy, inputs, targets[name])
    return list(targets.values())


def _merge(name: str, strategy: Strategy, inputs: Inputs, target: Path) -> None:
    memory = strategy.begin(inputs.base, {update.client: update.samples for update in inputs.updates})
    result = strategy.aggregate(inputs.base, inputs.updates, memory)
    for key, tensor in result.state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--method {name}: {key} is not finite after merging; use milder options (--set)")
    manifest = target.with_suffix(".json")
    manifest.unlink(missing_ok=True)
    projectors.save_projector(target, result.state, inputs.sources[0].architecture)
    write_json(manifest, _manifest(name, strategy, inputs, result, target))
    _summary(name, inputs, result.state, target)


def _inputs(paths: Sequence[Path], base: Path | None, weights: str | None) -> Inputs:
    """Read what is to be merged, and refuse what cannot be."""
    sources = _sources(paths)
    start, base_path = _base(base, sources[0])
    counts, weighted_by = _counts(sources, weights)
    updates = []
    for source, count in zip(sources, counts, strict=True):
        updates.append(Update(source.name, source.state, count))
        try:
            check(start, updates[-1:])
        except ValueError as error:
            raise UserError(f"{source.path}: cannot be merged: {error}; train it again") from None
    say(
        f"Base: {base_path}"
        if base_path
        else "Base: zero, so updates are the weights themselves; --base gives what they were trained from"
    )
    say(f"Weights: {weighted_by}")
    return Inputs(sources, start, base_path, updates, weighted_by)


def _method(name: str, overrides: Sequence[str], methods: Sequence[str]) -> Strategy:
    """A strategy that can merge what is on disk, with its options."""
    if name not in STRATEGIES.names():
        raise UserError(f"--method {name}: no method is called so{did_you_mean(name, STRATEGIES.names())}")
    options = _options(name, overrides, methods)
    strategy = STRATEGIES.build(Component(name=name, **options), name)
    if strategy.pooled:
        raise UserError(
            f"--method {name}: trains one client on all data and merges nothing; use another method"
        )
    lacking = sorted(strategy.wants - {"alignment"})
    if lacking:
        raise UserError(
            f"--method {name}: needs every client's {' and '.join(lacking)}, which projectors on disk do "
            "not hold; use it in training ('fedcmp federate'), or another method here"
        )
    return strategy


def _options(name: str, overrides: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    options = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        method, dot, option = key.strip().rpartition(".")
        if not equals or not option or (dot and method not in methods):
            raise UserError(
                f"--set {override}: expected option=value, or method.option=value with one of "
                f"{', '.join(methods)}"
            )
        if not method or method == name:
            options[option] = _value(text)
    return options


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _targets(out: Path, methods: Sequence[str]) -> dict[str, Path]:
    """The file each method writes."""
    if out.suffix != ".safetensors" or out.is_dir():
        return {method: out / f"{method}.safetensors" for method in methods}
    if len(methods) > 1:
        raise UserError(f"--out {out}: {len(methods)} methods write a file each; give a folder")
    return {methods[0]: out}


def _refuse_overwriting(inputs: Inputs, targets: Mapping[str, Path]) -> None:
    read = [source.path for source in inputs.sources] + ([inputs.base_path] if inputs.base_path else [])
    for target in targets.values():
        if target.resolve() in {path.resolve() for path in read}:
            raise UserError(f"--out {target}: is one of the projectors that are read; give another name")


def _file(path: Path) -> Path:
    """The projector of a run's directory, or the file itself."""
    return path / "projector.safetensors" if path.is_dir() else path


def _sources(paths: Sequence[Path]) -> list[Source]:
    """Read projectors that fit each other, named by file or run, and by content where that is not enough."""
    files = [_file(path) for path in paths]
    for number, file in enumerate(files):
        if file.resolve() in {earlier.resolve() for earlier in files[:number]}:
            raise UserError(f"{file}: is given twice; weight it with --weights instead")
    read = [_read(file) for file in files]
    names = [file.resolve().parent.name if file.stem == "projector" else file.stem for file in files]
    if len(set(names)) < len(names):
        hashes = [projectors.content_hash(state)[:8] for _, state in read]
        named = [f"{name}-{content}" for name, content in zip(names, hashes, strict=True)]
        names = [f"{name}-{named[:place].count(name)}" for place, name in enumerate(named)]
    sources = [
        Source(name, file, architecture, state, _samples(file))
        for name, file, (architecture, state) in zip(names, files, read, strict=True)
    ]
    for source in sources[1:]:
        _refuse_another_form(source.path, source.architecture, source.state, sources[0])
    return sources


def _read(path: Path) -> tuple[str, State]:
    """Architecture and float32 weights of a projector file."""
    module, state = projectors.load_projector(path)
    return module.architecture, {name: tensor.float() for name, tensor in state.items()}


def _refuse_another_form(path: Path, architecture: str, state: State, first: Source) -> None:
    if architecture != first.architecture:
        raise UserError(
            f"{path}: architecture {architecture}, but {first.path} is {first.architecture}; "
            "only projectors of one architecture can be merged"
        )
    for name, tensor in state.items():
        expected = first.state[name]
        if tensor.shape != expected.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but {tuple(expected.shape)} in "
                f"{first.path}; only projectors of one encoder and one LLM can be merged"
            )


def _base(path: Path | None, first: Source) -> tuple[State, Path | None]:
    """The projector that updates are counted from, and its file."""
    if path is None:
        return {name: torch.zeros_like(tensor) for name, tensor in first.state.items()}, None
    file = _file(path)
    architecture, state = _read(file)
    _refuse_another_form(file, architecture, state, first)
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{file}: cannot be the base: values that are not finite in {name}")
    return {name: state[name] for name in first.state}, file


def _samples(path: Path) -> int | None:
    """Samples a projector was trained on, by the history of its run; None where it has none."""
    path = path.resolve()
    of_silo = path.parent.name == "silos"
    file = (path.parent.parent if of_silo else path.parent) / "history.jsonl"
    if not file.is_file() or not (of_silo or path.stem == "projector"):
        return None
    rows = [row for row in history.read(file) if row.get("client")]
    seen = sum(row.get("samples", 0) for row in rows if not of_silo or row["client"] == path.stem)
    return seen or None


def _counts(sources: Sequence[Source], weights: str | None) -> tuple[list[int], str]:
    """Samples of every source, and in words where they come from."""
    if weights is not None:
        return _given_counts(weights, len(sources)), "as given by --weights"
    known = [source.samples for source in sources if source.samples is not None]
    if len(known) == len(sources):
        return known, "samples of the runs' histories"
    lacking = next(source.path for source in sources if source.samples is None)
    return [1] * len(sources), f"1 each, because {lacking} has no history.jsonl beside it"


def _given_counts(weights: str, number: int) -> list[int]:
    try:
        counts = [int(part) for part in weights.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--weights {weights}: expected whole numbers above 0 with commas, e.g. 3,5")
    if len(counts) != number:
        raise UserError(
            f"--weights {weights}: number of weights is {len(counts)}, of projectors {number}; give one each"
        )
    return counts


def _aligned(inputs: Inputs, guide: Guide) -> Inputs:
    """The inputs with the alignments of their updates."""
    from fedcmp.federate.client.alignment import alignment_contributions

    sources = inputs.sources
    if len(guide.features) not in (1, len(sources)):
        raise UserError(
            f"--features: number of caches is {len(guide.features)}, of projectors {len(sources)}; "
            "give one each in the same order, or one for all"
        )
    caches = {str(path): received(path) for path in guide.features}
    same_key(caches)
    files = model_hashes(guide.language, LANGUAGE_FILES)
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    language = load_language(guide.language, content=fingerprint(files), dtype=dtype, device=device)
    projector, _ = projectors.load_projector(sources[0].path)
    first = next(iter(caches.values()))
    _refuse_another_width(sources[0].path, projector, first, language, guide.language)
    projector.to(device)
    visual_tokens = projector.tokens(first.patches)
    without = {
        name: unusable(
            cache,
            language.tokenizer,
            template=guide.template,
            max_length=language.at_most(_MAX_LENGTH),
            visual_tokens=visual_tokens,
        )
        for name, cache in caches.items()
    }
    for name, reasons in without.items():
        if reasons:
            say(f"{name}: {len(reasons)} texts are left out; the first: {next(iter(reasons.values()))}")
    aligned = []
    with progress("alignment", len(sources), "projectors") as task:
        for number, update in enumerate(inputs.updates):
            name = str(guide.features[number % len(guide.features)])
            stream = Stream(
                {name: caches[name]},
                language,
                template=guide.template,
                max_length=language.at_most(_MAX_LENGTH),
                batch_size=_BATCH,
                turns=1,
                seed=0,
                visual_tokens=visual_tokens,
                without={name: without[name]},
            )
            some = islice(stream.batches(0), -(-guide.texts // _BATCH))
            contributions = alignment_contributions(projector, inputs.base, update.state, language, some)
            aligned.append(replace(update, alignment=contributions))
            task.advance()
    say(f"Alignment: {guide.texts} training texts at most from each of {', '.join(caches)}")
    guided = {
        "caches": {path: cache.content for path, cache in caches.items()},
        "language": {
            "path": str(guide.language),
            "files": files,
            "dtype": dtype,
            "device": device_type(device),
        },
        "template": guide.template,
        "texts": guide.texts,
        "contributions": {update.client: update.alignment for update in aligned},
    }
    return replace(inputs, updates=aligned, guided=guided)


def _refuse_another_width(
    source: Path, projector: Projector, cache: FeatureCache, language: FrozenLanguageModel, llm: Path
) -> None:
    for place, width, expected in (
        (cache.path, cache.d_vision, projector.d_vision),
        (llm, language.d_llm, projector.d_llm),
    ):
        if width != expected:
            raise UserError(
                f"{place}: has width {width}, but {source} maps {projector.d_vision} to {projector.d_llm}; "
                "give the features and the LLM that the projectors were trained with"
            )


def _manifest(
    name: str, strategy: Strategy, inputs: Inputs, result: Aggregate, target: Path
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "method": name,
        "options": strategy.model_dump(mode="json"),
        "inputs": [
            {
                "name": source.name,
                "path": str(source.path),
                "content": projectors.content_hash(source.state),
                "samples": update.samples,
            }
            for source, update in zip(inputs.sources, inputs.updates, strict=True)
        ],
        "weighted_by": inputs.weighted_by,
        "base": {
            "path": str(inputs.base_path) if inputs.base_path else None,
            "content": projectors.content_hash(inputs.base),
        },
        "alignment": inputs.guided if "alignment" in strategy.wants else None,
        "figures": result.figures,
        "projectors": {target.name: projectors.content_hash(result.state)},
        "made_by": provenance("cpu"),
    }


def _summary(name: str, inputs: Inputs, merged: State, target: Path) -> None:
    rows = [
        [
            update.client,
            f"{update.samples:,}",
            f"{history.distance(update.state, inputs.base):.4g}",
            _cosine(update.state, merged, inputs.base),
        ]
        for update in inputs.updates
    ]
    total = sum(update.samples for update in inputs.updates)
    rows.append(["merged", f"{total:,}", f"{history.distance(merged, inputs.base):.4g}", ""])
    table(f"{name}: {target}", ["input", "samples", "distance to base", "cosine to merged"], rows)


def _cosine(one: State, other: State, base: State) -> str:
    """Cosine of two updates over all weights; `-` where one of them is zero."""
    norms = history.distance(one, base) * history.distance(other, base)
    product = sum(
        float(((one[name] - old).double() * (other[name] - old).double()).sum()) for name, old in base.items()
    )
    return f"{product / norms:.3f}" if norms > 0 else "-"
