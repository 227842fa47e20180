"""The run that is judged, as it was configured and trained."""

from __future__ import annotations

from typing import Any

from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.identity import language_identity, run_differences, run_identity
from fedcmp.pipeline.run_folder import Run


def trained_run(experiment: Experiment, *, asking: bool = True) -> Run:
    """The finished run of an experiment.

    Args:
        experiment: The experiment.
        asking: Whether the LLM is to be asked. If not it need not be here, nor the device that it ran on;
            one that is here must still be the run's.

    Raises:
        UserError: The run is not finished, or was trained with another configuration or LLM.
    """
    path = experiment.run_path
    run = Run.find(path, experiment.federate.projector.plugins)
    if run is None:
        raise UserError(f"{path}: no finished run here; run 'fedcmp federate' first")
    language = None if asking else _recalled(experiment, run.identity.get("language", {}))
    changed = run_differences(run_identity(experiment, language), run.identity)
    if changed:
        raise UserError(
            f"{path}: trained with another configuration ({'; '.join(changed)}); run 'fedcmp federate' again"
        )
    return run


def _recalled(experiment: Experiment, trained: dict[str, Any]) -> dict[str, Any]:
    """The LLM's identity where it is here, else that of the run; dtypes are the asking machine's."""
    if not experiment.language.path.is_dir():
        return trained
    here = language_identity(experiment.model_copy(update={"device": "cpu"}))
    return here | {"dtype": trained.get("dtype")}
