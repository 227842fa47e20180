"""`fedcmp export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", required=True, type=click.Choice(["hf", "llava"]), help="Format to write.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--config", type=click.Path(path_type=Path), help="Experiment file, for what is not given.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of --config.")
@click.option("--encoder", metavar="DIR", help="The vision encoder; for llava also a name on the hub.")
@click.option("--language", metavar="DIR", type=click.Path(path_type=Path), help="The LLM.")
def export(
    run: Path,
    form: str,
    out: Path,
    config: Path | None,
    overrides: tuple[str, ...],
    encoder: str | None,
    language: Path | None,
) -> None:
    """Export a run's projector for Hugging Face or LLaVA; RUN is its directory or a projector's file.

    `hf` is a whole model for transformers' LlavaForConditionalGeneration, `llava` the projector and
    configuration that the LLaVA repository takes.

    \b
    Example:
      fedcmp export build/runs/clinics/clinics --to hf --out exported --config configs/clinics.toml
    """
    from fedcmp.components import load
    from fedcmp.pipeline.errors import UserError
    from fedcmp.pipeline.export.run import export as write

    if overrides and config is None:
        raise UserError(f"--set {overrides[0]}: overrides an experiment file; give one with --config")
    experiment = load(config, overrides) if config else None
    write(run, form, out, experiment=experiment, encoder=encoder, language=language)
