"""`fedcmp convert`: an LLM's GGUF file as a directory that transformers loads."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    type=click.Choice(("bfloat16", "float16", "float32")),
    help="Of the weights, which are dequantised.",
)
def convert(file: Path, out: Path, dtype: str) -> None:
    """Write a GGUF file's LLM and tokenizer as transformers saves them.

    Better take the original weights where they are to be had: a quantised file has lost precision.

    \b
    Example:
      fedcmp convert SmolLM2-135M-Instruct.Q4_1.gguf --out models/SmolLM2-135M-Instruct
    """
    from fedcmp.pipeline.console import say
    from fedcmp.pipeline.models.gguf import convert as convert_gguf

    convert_gguf(file, out, dtype)
    say(f"Wrote {out}; set language.path to it")
