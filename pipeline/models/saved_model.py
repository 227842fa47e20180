"""Which files of a saved model transformers reads, so that its identity is that of what is loaded.

Weights are taken as `PreTrainedModel.from_pretrained` takes them from a directory (transformers 5.0 to
5.24, `_get_resolved_checkpoint_files`): the first of `_WEIGHTS` that is there, and of an index exactly the
shards that it names. Whatever else lies beside them is not read and is no part of the identity. It is of
files: the same weights in other shards are another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.hashes import sha256_file

_INDEX = ".index.json"
_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
_ADAPTER = "adapter_config.json"
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")

# What the tokenizers of transformers read; `vocab_files_names` of their classes, and the templates.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.[0-9]*.json",
    "tokenizer.model*",
    "tiktoken.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "spm*.model",
    "*.spm",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "target_vocab.json",
    "word_pronunciation.json",
    "word_shape.json",
)
LANGUAGE_FILES = ("generation_config.json", *TOKENIZER_FILES)


def model_hashes(directory: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 by name of what is loaded of a saved model.

    Args:
        directory: Where it lies.
        files: Names or patterns of files that are read besides its configuration and weights.

    Raises:
        UserError: The directory holds no saved model, or one that different machines would load differently.
    """
    _refuse_ambiguous(directory)
    weights = weight_files(directory)
    others = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    named = [name for name in others if any(fnmatch(name, pattern) for pattern in files)]
    chosen = sorted({"config.json", *named} - set(weights))
    return {
        name: _sha256_unchanged(directory / name, *_stamp(directory / name)) for name in [*chosen, *weights]
    }


def weight_files(directory: Path) -> list[str]:
    """Names of the weights that transformers loads from a directory, an index before its shards.

    Raises:
        UserError: There are none, or an index cannot be read or names a file that is not there.
    """
    config = _read(directory / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{directory}: no config.json with weights; give the directory of a saved model")
    named = config.get("transformers_weights")
    candidates = _WEIGHTS if named is None else (str(named),)
    found = next((name for name in candidates if (directory / name).is_file()), None)
    if found is None:
        raise UserError(f"{directory}: {_instead(directory, candidates)}")
    if not found.endswith(_INDEX):
        return [found]
    index = _read(directory / found)
    try:
        shards = sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{directory / found}: no index of weights; save the model again") from None
    lost = [name for name in shards if not (directory / name).is_file()]
    if lost:
        raise UserError(f"{directory}: {found} names {lost[0]}, which is not there; copy the whole model")
    return [found, *shards]


def why_unloadable(error: Exception) -> str:
    """Why transformers could not load a model, on one line."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), which is never run; give a model that transformers knows"
    return one_line(error)


def _refuse_ambiguous(directory: Path) -> None:
    """Refuse what is loaded differently where other packages, or another transformers, are installed."""
    if (directory / _ADAPTER).exists():
        raise UserError(
            f"{directory}: holds a PEFT adapter ({_ADAPTER}), which is loaded where peft is installed and "
            "ignored elsewhere; merge it into the model (merge_and_unload, save_pretrained) and give that "
            "model, or move the adapter away"
        )
    config = _read(directory / "config.json")
    if isinstance(config, dict) and config.get("configuration_files"):
        raise UserError(
            f"{directory}: its config.json has configuration_files, of which every transformers takes "
            "another; keep one as config.json"
        )
    shards = [path.name for path in _files(directory) if _DISTRIBUTED.fullmatch(path.name)]
    if shards:
        raise UserError(
            f"{directory}: holds a distributed checkpoint ({shards[0]}), which only some versions of "
            "transformers load; save the model with save_pretrained"
        )


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except UserError:
        raise UserError(f"{path}: not valid JSON; copy the model again") from None


def _instead(directory: Path, candidates: Iterable[str]) -> str:
    """What is wrong with a directory that has none of the weights that would be loaded."""
    names = [path.name for path in _files(directory)]
    packed = [name for name in names if name.endswith(".gguf")]
    if packed:
        return f"holds GGUF ({packed[0]}); load it with transformers (gguf_file=...) and save_pretrained"
    stray = [name for name in names if name.endswith((".safetensors", ".bin"))]
    beside = f"; {stray[0]} is not loaded under this name" if stray else ""
    return (
        f"no config.json with weights ({', '.join(candidates)}){beside}; give the directory of a saved model"
    )


def _files(directory: Path) -> list[Path]:
    """Files of a directory and of its folder of templates."""
    places = ("*", "additional_chat_templates/*")
    return sorted(path for place in places for path in directory.glob(place) if path.is_file())


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@lru_cache(maxsize=1024)
def _sha256_unchanged(path: Path, *stamp: int) -> str:
    """Hash of a file, kept while its size, times and inode stay: an LLM is not read for every run."""
    return sha256_file(path)
