"""What decides the bytes of a run besides its caches; both training and evaluation compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import Experiment
from pipeline.device import pick_device, pick_dtype
from pipeline.gguf import refuse_gguf
from pipeline.manifest import fingerprint, model_hashes

FORMAT = {"name": "fedcmp-run", "version": 1}
LANGUAGE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def language_identity(experiment: Experiment) -> dict[str, Any]:
    """The frozen LLM: SHA-256 of its files, and the dtype it computes in."""
    options = experiment.language
    refuse_gguf(options.path)
    identity: dict[str, Any] = {
        "files": model_hashes(options.path, LANGUAGE_FILES),
        "dtype": pick_dtype(options.dtype, pick_device(experiment.device)),
    }
    if options.quantize != "none":
        identity["quantize"] = options.quantize
    return identity


def language_options(experiment: Experiment) -> dict[str, Any]:
    """How the frozen LLM is loaded: arguments of `load_language` besides its path."""
    identity = language_identity(experiment)
    options = experiment.language
    return {
        "content": fingerprint(identity["files"]),
        "dtype": identity["dtype"],
        "device": pick_device(experiment.device),
        "quantize": options.quantize,
        "device_map": options.device_map,
    }


def run_identity(experiment: Experiment, language: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON value of every option that decides the trained projector.

    Args:
        experiment: The experiment.
        language: The LLM's identity where it is not on this machine.
    """
    federate = experiment.federate.model_dump(mode="json", exclude={"initial", "checkpointing"})
    if not experiment.federate.compile:
        del federate["compile"]  # runs from before the option stay valid
    if experiment.federate.initial is not None:
        federate["initial"] = _initial_content(experiment.federate.initial)
    return {
        "format": FORMAT,
        "seed": experiment.seed,
        "federate": federate,
        "language": (language or language_identity(experiment))
        | {"template": experiment.language.template, "max_length": experiment.language.max_length},
    }


def _initial_content(path: Path) -> str:
    """What the initial weights are, wherever they lie."""
    from pipeline.pretrained import read_weights
    from pipeline.projector import content_hash

    return content_hash(read_weights(path)[1])
