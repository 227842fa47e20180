"""Combinations in which what is private would not stay so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcmp.federate.privacy.accounting import resolved
from fedcmp.federate.privacy.noise import LEAST_ULPS, ULP
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.privacy import Privacy

if TYPE_CHECKING:
    from fedcmp.federate.strategies.base import Strategy


def refuse(experiment: Experiment, strategy: Strategy) -> None:
    """Refuse runs that would send something that is not private.

    Raises:
        UserError: Naming the option.
    """
    options = experiment.federate.clipped
    if options is None:
        return
    if options.unit == "client":
        _clients(experiment, strategy)
    else:
        _records(experiment, strategy, options)


def _clients(experiment: Experiment, strategy: Strategy) -> None:
    options = experiment.federate
    where, name = "federate.privacy.clip", options.strategy.name
    if strategy.sees() != "mean" or strategy.pooled or strategy.personal:
        raise UserError(
            f"{where}: strategy '{name}' looks at more than the mean update, which is all that is kept "
            "private; use one that does not, or unit = 'text' or 'image' (docs/privacy.md)"
        )
    if options.communication is not None:
        raise UserError(
            f"federate.communication.payload = '{options.communication.payload}': what clipping removes "
            "must not be sent later; use float32"
        )
    if options.optimizer.carry:
        raise UserError(f"{where}: moments that clients carry on would reveal their updates; remove carry")


def _records(experiment: Experiment, strategy: Strategy, options: Privacy) -> None:
    federate, where = experiment.federate, f"federate.privacy.unit = '{options.unit}'"
    if "alignment" in strategy.wants:
        raise UserError(
            f"{where}: strategy '{federate.strategy.name}' asks for the alignment of features and texts, "
            "which has no noise; use another one"
        )
    if experiment.language.quantize == "8bit":
        raise UserError(
            f"{where}: an LLM in 8 bits treats a batch's samples together, so none has a gradient of its "
            "own; use language.quantize = 'none' or '4bit'"
        )
    if any(poison.kind == "captions" for poison in (federate.poison or {}).values()):
        raise UserError(f"{where}: swapped captions would be in two samples; remove federate.poison")
    multiplier = resolved(options, 1, federate.passes).noise_multiplier
    if 0 < multiplier < LEAST_ULPS * ULP * federate.batch_size:
        raise UserError(
            f"federate.privacy.noise_multiplier = {multiplier:g}: noise so small would be lost in the "
            f"rounding of sums over batches of {federate.batch_size}; raise it"
        )
