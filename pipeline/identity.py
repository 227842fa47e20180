"""What decides the bytes of a run besides its caches; both training and evaluation compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcmp.pipeline.cache import differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.models.device import pick_device, pick_dtype
from fedcmp.pipeline.models.gguf import refuse_gguf
from fedcmp.pipeline.models.saved_model import LANGUAGE_FILES, model_hashes
from fedcmp.pipeline.plugins import Plugin

# 2: of the files that are loaded, and of components as they are built.
FORMAT = {"name": "fedcmp-run", "version": 2}


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
        "adapter": experiment.federate.adapter,
    }


def federate_options(experiment: Experiment) -> dict[str, Any]:
    """JSON value of all of stage two that decides a client's training, however it was written down.

    Components count with all their options, and what stands for a number is that number.
    """
    options = experiment.federate
    written = options.as_identity("initial", "checkpointing", "projector", "strategy")
    return written | {
        "projector": options.projector.as_built(),
        "strategy": options.strategy.as_built(),
        "micro_batch": options.micro_batch or options.batch_size,
        "clients_per_round": min(options.clients_per_round or len(options.silos), len(options.silos)),
    }


def run_identity(experiment: Experiment, language: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON value of every option that decides the trained projector.

    Args:
        experiment: The experiment.
        language: The LLM's identity where it is not on this machine.
    """
    federate = federate_options(experiment)
    if experiment.federate.initial is not None:
        federate["initial"] = _initial_content(
            experiment.federate.initial, experiment.federate.projector.plugins
        )
    aligned = (
        {} if experiment.align is None else {"align": experiment.align.as_built(experiment.federate.silos)}
    )
    return {
        "format": FORMAT,
        "seed": experiment.seed,
        "federate": federate,
        **aligned,
        "language": (language or language_identity(experiment)) | written_by(experiment),
    }


def written_by(experiment: Experiment) -> dict[str, Any]:
    """How texts become the prompts that are trained on."""
    options = experiment.language
    asked = {} if experiment.align is None else {"question_template": options.question_template}
    return {"template": options.template, "max_length": options.max_length, **asked}


def run_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """How a run's identity differs from that of a run that is there, as `place: ours, theirs`."""
    if theirs.get("format") != FORMAT:
        return [f"format: that of another version of FedCMP ({theirs.get('format')}, not {FORMAT})"]
    return differences(ours, {name: theirs.get(name) for name in ours})


def _initial_content(path: Path, plugins: tuple[Plugin, ...]) -> str:
    """What the initial weights are, wherever they lie."""
    from fedcmp.pipeline.models.pretrained import read_weights
    from fedcmp.pipeline.models.projector import content_hash

    return content_hash(read_weights(path, plugins)[1])
