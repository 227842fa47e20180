"""How a finished run is written down, its weights and last its manifest, and how it is found again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedcmp.federate.engines.base import SiloCard
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import run_differences
from fedcmp.pipeline.manifest import provenance, withdraw_manifest, write_manifest
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.device import pick_device
from fedcmp.pipeline.models.lora import divided, save_adapter
from fedcmp.pipeline.run_folder import Run, adapter_folder


def finish(
    experiment: Experiment,
    strategy: str,
    wanted: dict[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    architecture: str,
    card: SiloCard,
    texts: Mapping[str, Mapping[str, int]],
    facts: Mapping[str, Any],
) -> Run:
    """Write the run of an experiment.

    Args:
        experiment: The experiment.
        strategy: Its name, for people.
        wanted: Its identity.
        states: What was trained, by file of the projector.
        architecture: Of the projectors.
        card: Of any silo, for the features.
        texts: How many each silo has trained on, and left out.
        facts: What else the manifest says.
    """
    options, out = experiment.federate, experiment.run_path
    contents, adapters = {}, {}
    for name, state in states.items():
        weights, adapter = divided(state)
        projectors.save_projector(out / name, weights, architecture)
        contents[name] = projectors.content_hash(weights)
        if options.adapter is not None:
            save_adapter(adapter_folder(out, name), adapter, options.adapter, str(experiment.language.path))
            adapters[name] = projectors.content_hash(adapter)
    manifest = {
        "experiment": experiment.experiment,
        "run": experiment.run,
        "strategy": strategy,
        "identity": wanted,
        "fingerprint": fingerprint(wanted),
        "cache_key": fingerprint(card.key),
        "texts": texts,
        "features": {"patches": card.patches, "key": card.key},
        "projectors": contents,
        **facts,
        **({"adapters": adapters} if adapters else {}),
        "made_by": provenance(pick_device(experiment.device)),
    }
    write_manifest(out, manifest)
    return Run(out, manifest, options.projector.plugins)


def found(experiment: Experiment, wanted: Mapping[str, Any]) -> Run | None:
    """A run that is finished and whole. Of any other the manifest is withdrawn, and why is said.

    Args:
        experiment: The experiment.
        wanted: Its identity.
    """
    out = experiment.run_path
    made = Run.find(out, experiment.federate.projector.plugins)
    if made is not None:
        changed = run_differences(dict(wanted), made.identity) or _damaged(made)
        if not changed:
            say(f"{out}: nothing to do, this run is what the configuration asks for")
            return made
        say(f"{out}: training again, because {'; '.join(changed)}")
    withdraw_manifest(out)
    return None


def _damaged(run: Run) -> list[str]:
    """Why the projectors of a finished run are not those that it ended with."""
    for name in run.projectors:
        try:
            run.projector(name)
            run.adapter(name)
        except UserError:
            return [f"{name} is missing or not the one of its manifest"]
    return []
