"""The run that is judged: its manifest, and its projectors as they really are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.identity import language_identity, run_differences, run_identity

if TYPE_CHECKING:
    from fedcmp.pipeline.models.projectors.base import Projector


def read_manifest(experiment: Experiment, *, asking: bool = True) -> dict[str, Any]:
    """The finished run's manifest.

    Args:
        experiment: The run.
        asking: Whether the LLM is to be asked. If not it need not be here, nor the device that it ran on;
            one that is here must still be the run's.

    Raises:
        UserError: The run is not finished, or was trained with another configuration or LLM.
    """
    path = experiment.run_path
    manifest: dict[str, Any] | None = read_json(path / "manifest.json")
    if manifest is None:
        raise UserError(f"{path}: no finished run here; run 'fedcmp federate' first")
    found = manifest.get("identity", {})
    ours = run_identity(experiment, None if asking else _recalled(experiment, found.get("language", {})))
    changed = run_differences(ours, found)
    if changed:
        raise UserError(
            f"{path}: trained with another configuration ({'; '.join(changed)}); run 'fedcmp federate' again"
        )
    return manifest


def _recalled(experiment: Experiment, trained: dict[str, Any]) -> dict[str, Any]:
    """The LLM's identity where it is here, else that of the run; dtypes are the asking machine's."""
    if not experiment.language.path.is_dir():
        return trained
    here = language_identity(experiment.model_copy(update={"device": "cpu"}))
    return here | {"dtype": trained.get("dtype")}


def require_encoding(experiment: Experiment, cache: FeatureCache, manifest: dict[str, Any]) -> None:
    """A run sees only features such as those it was trained on.

    Raises:
        UserError: The cache's are others.
    """
    if cache.cache_key != manifest["cache_key"]:
        raise UserError(
            f"{cache.path}: encoded differently from the silos of {experiment.run_path}; "
            "extract it with the run's configuration"
        )


def own_projector(experiment: Experiment, manifest: dict[str, Any], name: str) -> Projector:
    """A projector of a run, by its file's name within it.

    Raises:
        UserError: The file is missing, damaged, or holds other weights than the run ended with.
    """
    from fedcmp.pipeline.models.projector import content_hash, load_projector

    path = experiment.run_path / name
    projector, state = load_projector(path, experiment.federate.projector.plugins)
    if content_hash(state) != manifest["projectors"][name]:
        raise UserError(f"{path}: the run was trained again meanwhile; run the same command again")
    return projector
