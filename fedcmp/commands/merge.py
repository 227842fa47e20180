"""`fedcmp merge`: projectors into one."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("projectors", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--method", "methods", multiple=True, required=True, metavar="NAME", help="Any strategy; repeatable."
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write, or a folder that gets NAME.safetensors of each method.",
)
@click.option(
    "--plugin",
    "files",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Python file with methods or projectors of your own; repeatable.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Projector they were trained from; else zero.")
@click.option("--weights", metavar="N1,N2,...", help="Samples of each; else those of the runs' histories.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="[METHOD.]OPTION=VALUE",
    help="A method's option; repeatable.",
)
@click.option(
    "--features",
    multiple=True,
    metavar="CACHE",
    type=click.Path(path_type=Path),
    help="Feature cache to compute alignments from: one each in order, or one for all.",
)
@click.option(
    "--language", metavar="DIR", type=click.Path(path_type=Path), help="The frozen LLM, for alignments."
)
@click.option(
    "--template",
    type=click.Choice(["plain", "chat", "v1"]),
    default="plain",
    show_default=True,
    help="How texts become prompts.",
)
@click.option(
    "--texts", type=click.IntRange(2), default=256, show_default=True, help="Texts to take from each cache."
)
def merge(
    projectors: tuple[Path, ...],
    methods: tuple[str, ...],
    out: Path,
    files: tuple[Path, ...],
    base: Path | None,
    weights: str | None,
    overrides: tuple[str, ...],
    features: tuple[Path, ...],
    language: Path | None,
    template: str,
    texts: int,
) -> None:
    """Merge trained projectors, files or directories of runs, into one without training.

    \b
    Example:
      fedcmp merge build/runs/demo/local_only/silos/*.safetensors \\
        --base build/runs/demo/untrained --method fedavg --method pivotmerge --out build/merged
    """
    from fedcmp.federate.merge.guide import Guide
    from fedcmp.federate.merge.run import merge as merge_projectors
    from fedcmp.pipeline import plugins
    from fedcmp.pipeline.errors import UserError

    if bool(features) != bool(language):
        raise UserError("--features and --language are needed together, to compute alignments; give both")
    guide = None
    if language:
        guide = Guide(features=features, language=language, template=template, texts=texts)
    merge_projectors(
        projectors,
        methods,
        out,
        base=base,
        weights=weights,
        overrides=overrides,
        guide=guide,
        plugins=tuple(plugins.read(file.absolute()) for file in files),
    )
