"""A causal LM and its tokenizer from a directory, or one line that says why they cannot be used."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.gguf import refuse_gguf
from fedcmp.pipeline.models.saved_model import why_unloadable

_PROBE = "Is there a dog? Two 650841823 don't,  über\n\tof 2023: x-ray L4/5, 12.5 mm.\n"
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "*.tiktoken", "tekken.json")


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a model's directory.

    Raises:
        UserError: There is none, it knows no words, or it is not a fast one.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        if any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise UserError(
                f"language.path = {path}: its tokenizer cannot be loaded: {why_unloadable(error)}"
            ) from None
        tokenizer = None
    # Without files transformers makes a tokenizer of special tokens alone.
    if tokenizer is None or not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UserError(
            f"language.path = {path}: no tokenizer in it; copy the model's tokenizer.json and "
            "tokenizer_config.json there"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"language.path = {path}: {type(tokenizer).__name__} is not a fast tokenizer, which says where "
            "each token ends in a text; add a tokenizer.json"
        )
    return _as_written(path, tokenizer)


def _as_written(path: Path, tokenizer: Any) -> Any:
    """The tokenizer if it splits words as its tokenizer.json says, else one made from that file alone.

    The class that transformers 5 takes for a type of model may put its own rules in place of the file's:
    spaces and numbers of OLMo 2, Yi or DeepSeek's Llamas become other tokens without a word
    (huggingface/transformers issues 45488 and 45920).

    Raises:
        UserError: Neither splits words so.
    """
    file = path / "tokenizer.json"
    if not file.is_file() or _splits_as(file, tokenizer):
        return tokenizer
    plain: Any = PreTrainedTokenizerFast.from_pretrained(path)
    if not _splits_as(file, plain):
        raise UserError(
            f"language.path = {path}: {type(tokenizer).__name__} splits words differently from "
            "tokenizer.json says; set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
        )
    return plain


def _splits_as(file: Path, tokenizer: Any) -> bool:
    raw = Tokenizer.from_file(str(file))
    raw.no_padding()
    raw.no_truncation()
    wanted = raw.encode(_PROBE, add_special_tokens=False).ids
    return bool(tokenizer(_PROBE, add_special_tokens=False)["input_ids"] == wanted)


def load_model(path: Path, *, dtype: str, device: str, quantize: str, device_map: str) -> tuple[Any, bool]:
    """A causal LM in eval mode, its parameters frozen, and whether transformers placed it on its devices.

    Args:
        path: Directory of a saved model.
        dtype: `bfloat16` or `float32`.
        device: Where it runs.
        quantize: `8bit` or `4bit` (NF4) weights by bitsandbytes, or `none`.
        device_map: `auto` spreads its layers over all GPUs and main memory, `none` does not.

    Raises:
        UserError: The directory is missing or does not hold such a model with all of its weights, or a
            package is missing.
    """
    transformers_logging.disable_progress_bar()
    placed = _placement(quantize, device_map, device)
    refuse_gguf(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"language.path = {path}: {config.model_type} is an encoder-decoder; give a decoder-only LM"
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            quantization_config=_quantization(quantize, dtype),
            device_map=placed,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"language.path = {path}: cannot be loaded: {why_unloadable(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise UserError(
            f"language.path = {path}: {missing} is missing from its weights and would be random; give "
            "the whole causal LM"
        )
    model = (model if placed else model.to(device)).eval().requires_grad_(False)
    for module in model.modules():
        # bitsandbytes would repack 4-bit weights in the first pass without gradients; later ones are wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, placed is not None


def _placement(quantize: str, device_map: str, device: str) -> Any:
    """What transformers is told about devices; None where the model is moved as a whole.

    Raises:
        UserError: A package is missing.
    """
    for package, key, value in (
        ("bitsandbytes", "quantize", quantize),
        ("accelerate", "device_map", device_map),
    ):
        if value != "none" and find_spec(package) is None:
            raise UserError(f"language.{key} = '{value}': needs {package}; run: pip install 'fedcmp[large]'")
    if device_map != "none":
        return device_map
    return {"": device} if quantize != "none" else None


def _quantization(quantize: str, dtype: str) -> BitsAndBytesConfig | None:
    if quantize == "none":
        return None
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
