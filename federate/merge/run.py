"""`fedcmp merge`: trained projectors in, one projector and its manifest out, without training."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import State, distance
from fedcmp.federate.merge.guide import Guide, aligned
from fedcmp.federate.merge.inputs import Inputs, read_inputs
from fedcmp.federate.strategies.base import STRATEGIES, Aggregate, Strategy, require_form
from fedcmp.pipeline.console import say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_json
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.plugins import Plugin, blamed

FORMAT = {"name": "fedcmp-merge", "version": 1}


def merge(
    paths: Sequence[Path],
    methods: Sequence[str],
    out: Path,
    *,
    base: Path | None = None,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    guide: Guide | None = None,
    plugins: tuple[Plugin, ...] = (),
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
        plugins: Plugin files that may have the methods and the projectors' architecture.

    Returns:
        The files written.

    Raises:
        UserError: A file, method, option or number is wrong.
    """
    components = {
        name: Component(name=name, **_options(name, overrides, methods)).with_plugins(plugins)
        for name in methods
    }
    strategies = {name: _method(component) for name, component in components.items()}
    targets = _targets(out, list(strategies))
    inputs = read_inputs(paths, base, weights, plugins)
    _refuse_overwriting(inputs, targets)
    wanting = [name for name, strategy in strategies.items() if "alignment" in strategy.wants]
    guided = dict.fromkeys(strategies, inputs)
    if guide and wanting:
        measures = {strategies[name].aligned_by() for name in wanting}
        of = {measure: aligned(inputs, guide, measure, plugins) for measure in sorted(measures)}
        guided |= {name: of[strategies[name].aligned_by()] for name in wanting}
    elif wanting:
        say(f"{', '.join(wanting)}: without --features and --language, alignments do not weight the layers")
    elif guide:
        say(f"--features and --language are not used: {', '.join(strategies)} takes no alignments")
    for name, strategy in strategies.items():
        plugin = STRATEGIES.provenance(components[name], name)
        _merge(name, strategy, guided[name], targets[name], plugin)
    return list(targets.values())


def _merge(name: str, strategy: Strategy, inputs: Inputs, target: Path, plugin: dict[str, str]) -> None:
    memory = strategy.begin(inputs.base, {update.client: update.samples for update in inputs.updates})
    with blamed(strategy, f"--method {name}"):
        result = strategy.aggregate(inputs.base, inputs.updates, memory)
        require_form(inputs.base, result)
    for key, tensor in result.state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--method {name}: {key} is not finite after merging; use milder options (--set)")
    manifest = target.with_suffix(".json")
    manifest.unlink(missing_ok=True)
    projectors.save_projector(target, result.state, inputs.sources[0].architecture)
    write_json(manifest, _manifest(name, strategy, inputs, result, target) | plugin)
    _summary(name, inputs, result.state, target)


def _method(component: Component) -> Strategy:
    """A strategy that can merge what is on disk, with its options."""
    name = component.name
    strategy = STRATEGIES.build(component, name)
    if strategy.local:
        raise UserError(
            f"--method {name}: every client keeps part of its projector to itself, so that no file holds "
            "a whole one; use another method"
        )
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
            f"{distance(update.state, inputs.base):.4g}",
            _cosine(update.state, merged, inputs.base),
        ]
        for update in inputs.updates
    ]
    total = sum(update.samples for update in inputs.updates)
    rows.append(["merged", f"{total:,}", f"{distance(merged, inputs.base):.4g}", ""])
    table(f"{name}: {target}", ["input", "samples", "distance to base", "cosine to merged"], rows)


def _cosine(one: Mapping[str, Tensor], other: State, base: State) -> str:
    """Cosine of two updates over all weights; `-` where one of them is zero."""
    norms = distance(one, base) * distance(other, base)
    product = sum(
        float(((one[name] - old).double() * (other[name] - old).double()).sum()) for name, old in base.items()
    )
    return f"{product / norms:.3f}" if norms > 0 else "-"
