"""GGUF weights, which transformers neither finds by itself nor saves again."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import replace_directory


def refuse_gguf(path: Path) -> None:
    """Tell what to do with such a file, or with a directory whose only weights are such files.

    Raises:
        UserError: It is one.
    """
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files and not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise UserError(
            f"language.path = {path}: {files[0].name} is a GGUF file; give the directory of the original "
            f"safetensors weights, or convert it: fedcmp convert {files[0]} --out DIR"
        )


def convert(file: Path, out: Path, dtype: str = "float32") -> None:
    """Write a GGUF file's LLM and tokenizer as a directory of transformers; its weights are dequantised.

    Args:
        file: The GGUF file.
        out: Directory to write; what is there is whole.
        dtype: Of the weights: `float32`, `bfloat16` or `float16`.

    Raises:
        UserError: There is no such file, something is in the directory, the package `gguf` is missing, or
            transformers cannot read the file.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: there is something already; give another directory, or remove it first")
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a GGUF file")
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        read = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except ImportError:
        raise UserError(
            f"{file}: GGUF files are read by the package gguf; pip install 'fedcmp[study]'"
        ) from None
    except Exception as error:
        raise UserError(
            f"{file}: transformers cannot read it: {one_line(error)}; give the original safetensors weights"
        ) from None
    # What was read from GGUF cannot be saved as it is.
    config = read.config
    config.__dict__.pop("quantization_config", None)
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    replace_directory(partial, out)
