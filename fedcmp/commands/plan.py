"""`fedcmp plan`: disk, GPU hours and memory of an experiment, from configurations alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedcmp.commands.options import experiment_options
from fedcmp.pipeline.models.device import PEAKS

if TYPE_CHECKING:
    from fedcmp.pipeline.config import Experiment
    from fedcmp.pipeline.options import Component

_BITS = {"bfloat16": 16.0, "8bit": 8.0, "4bit": 4.5}
_STORED = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}


@click.command()
@experiment_options
@click.option("--images", default=558_000, show_default="LLaVA's 558k", help="Image-text pairs of all silos.")
@click.option("--text-tokens", default=32, show_default=True, help="Tokens of a text.")
@click.option(
    "--gpu", type=click.Choice(list(PEAKS)), default="h100", show_default=True, help="GPU to estimate for."
)
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.3,
    show_default=True,
    help="Share of the GPU's peak that is reached; LLaVA's own pre-training of 7B on A100s reached 0.3.",
)
def plan(
    config: Path, overrides: tuple[str, ...], images: int, text_tokens: int, gpu: str, utilisation: float
) -> None:
    """Estimate disk, GPU hours and memory before there are any data or weights.

    Only the models' configurations are read. Where a model is not on this machine they are looked
    for in models/NAME beside the configuration.

    \b
    Example:
      fedcmp plan configs/llava-1.5-7b.toml
      fedcmp plan configs/qwen-0.5b.toml --images 60000 --gpu 4090
    """
    from rich.filesize import decimal

    from fedcmp.components import load
    from fedcmp.extract.estimate import outlines as outlines_of
    from fedcmp.pipeline.console import say, table
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.models.shape import language_shape

    experiment = load(config, overrides)
    options = experiment.extract
    outlines = outlines_of(_beside(options.encoder, config))
    adapter = experiment.federate.adapter
    model = language_shape(_configured(experiment.language.path, config), adapter)
    rate = PEAKS[gpu] * 1e12 * utilisation * 3600
    passes = experiment.federate.passes
    rows, sizes = [], {}
    for outline in outlines:
        try:
            visual, parameters = _projector(experiment, outline.patches, outline.d_vision, model.width)
        except UserError:
            if outline is outlines[0]:
                raise
            continue
        training = model.training_flops(visual + text_tokens, text_tokens, experiment.federate.checkpointing)
        training += 6 * parameters * outline.patches
        sizes[outline.pool] = images * outline.patches * outline.d_vision * _STORED[options.dtype]
        rows.append(
            [
                f"pool = {outline.pool}" + (" (configured)" if outline is outlines[0] else ""),
                f"{outline.patches} x {outline.d_vision}",
                str(visual),
                decimal(sizes[outline.pool]),
                f"{images * outline.flops / rate:,.1f} h",
                f"{images * passes * training / rate:,.1f} h",
            ]
        )
    table(
        f"{images:,} images, {text_tokens} text tokens each; one {gpu.upper()} at {utilisation:.0%} of "
        f"{PEAKS[gpu]:g} TFLOP/s",
        [
            "features",
            "an image",
            "visual tokens",
            f"cache ({options.dtype})",
            "extract",
            f"federate ({passes} passes)" if passes > 1 else "federate",
        ],
        rows,
    )
    weights = [f"{decimal(model.size(bits))} in {name}" for name, bits in _BITS.items()]
    say(f"The LLM's weights in GPU memory: {', '.join(weights)}")
    if adapter is not None:
        say(f"The adapter: {model.adapter:,} weights, {decimal(4 * model.adapter)} of a client's update")
    say(_advice(experiment, sizes))


def _projector(experiment: Experiment, patches: int, d_vision: int, d_llm: int) -> tuple[int, int]:
    """Visual tokens and parameters of the projector.

    Raises:
        UserError: There is no such projector, or it does not take so many patches.
    """
    import torch

    from fedcmp.pipeline.models import projector as projectors

    with torch.device("meta"):
        made = projectors.build(experiment.federate.projector, d_vision=d_vision, d_llm=d_llm)
        return made.tokens(patches), sum(parameter.numel() for parameter in made.parameters())


def _beside(encoder: Component, config: Path) -> Component:
    """The encoder, its directory looked for beside the configuration where it is not here."""
    path = (encoder.model_extra or {}).get("path")
    return (
        encoder if path is None else encoder.model_copy(update={"path": str(_configured(Path(path), config))})
    )


def _configured(path: Path, config: Path) -> Path:
    """A model's directory, or what is known of it beside the configuration.

    Raises:
        UserError: There is neither.
    """
    from fedcmp.pipeline.errors import UserError

    known = config.parent / "models" / path.name
    for place in (path, known):
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{path}: no config.json; copy the model's config.json and preprocessor_config.json to {known}, no "
        "weights are needed"
    )


def _advice(experiment: Experiment, sizes: dict[int, int]) -> str:
    """Whether the caches fit on the disk, and the least that would make them fit."""
    from rich.filesize import decimal

    place = experiment.features.absolute()
    while not place.exists():
        place = place.parent
    free, stored = shutil.disk_usage(place).free, experiment.extract.dtype
    wanted, *_ = sizes.values()
    where = f"the {decimal(free)} free at {place}"
    if wanted <= free:
        return f"The caches, {decimal(wanted)}, fit into {where}"
    remedies = {"extract.dtype = 'int8'": wanted // _STORED[stored]}
    remedies |= {f"extract.encoder.pool = {pool}": size for pool, size in sizes.items()}
    remedies |= {
        f"extract.encoder.pool = {p}, dtype = 'int8'": s // _STORED[stored] for p, s in sizes.items()
    }
    fitting = {size: remedy for remedy, size in remedies.items() if size <= free}
    remedy = f"set {fitting[max(fitting)]} ({decimal(max(fitting))})" if fitting else "extract fewer images"
    return f"The caches, {decimal(wanted)}, do not fit into {where}; {remedy}"
