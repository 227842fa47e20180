"""GGUF weights, which transformers neither finds by itself nor saves again."""

from __future__ import annotations

from pathlib import Path

from fedcmp.pipeline.errors import UserError


def refuse_gguf(path: Path) -> None:
    """Tell what to do with such a file, or with a directory whose only weights are such files.

    Raises:
        UserError: It is one.
    """
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files and not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise UserError(
            f"language.path = {path}: {files[0].name} is a GGUF file; give the directory of the original "
            "safetensors weights, or convert it as docs/language.md says"
        )
