"""Every combination of options that is refused before a run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from fedcmp.federate.privacy import rules
from fedcmp.federate.schedule import Schedule
from fedcmp.federate.secure.numbers import LEAST
from fedcmp.pipeline.config import Experiment, Federate
from fedcmp.pipeline.errors import UserError

if TYPE_CHECKING:
    from fedcmp.federate.strategies.base import Strategy


def refuse(experiment: Experiment, strategy: Strategy, schedule: Schedule) -> None:
    """Refuse what would not be what its options say.

    Raises:
        UserError: Naming the option.
    """
    options = experiment.federate
    strategy.refuse(options)
    if strategy.personal and strategy.update == "path":
        raise UserError(
            f"federate.strategy.update = 'path': with strategy '{options.strategy.name}' clients go on from "
            "their own projectors, which are where their optimisers end; use 'weights'"
        )
    if options.adapter is not None:
        _refuse_adapter(options)
    if options.communication is not None and options.secure:
        raise UserError(
            f"federate.communication.payload = '{options.communication.payload}': secure sums are of exact "
            "numbers; use float32"
        )
    if options.shard and "alignment" in strategy.wants:
        raise UserError(
            f"federate.shard = true: strategy '{options.strategy.name}' measures alignment in one process; "
            "use another strategy, or language.quantize in place of shard"
        )
    if options.secure and find_spec("cryptography") is None:
        raise UserError("federate.privacy.secure: needs cryptography; run: pip install 'fedcmp[privacy]'")
    if options.secure:
        _refuse_insecure(options, schedule, strategy)
    rules.refuse(experiment, strategy)


def _refuse_adapter(options: Federate) -> None:
    """Refuse what cannot be done with an adapter in the one LLM that clients share.

    Raises:
        UserError: Naming the option.
    """
    if options.together > 1:
        raise UserError(
            f"federate.together = {options.together}: with federate.adapter every client has an LLM of its "
            "own; set it to 1"
        )
    if options.shard:
        raise UserError("federate.shard: spreads a frozen LLM alone; remove it, or federate.adapter")
    if options.clipped is not None and options.clipped.unit != "client":
        raise UserError(
            f"federate.privacy.unit = '{options.clipped.unit}': gradients are clipped at the projector only; "
            "use 'client', or no federate.adapter"
        )


def refuse_over_sites(experiment: Experiment, strategy: Strategy) -> None:
    """Refuse what cannot run over sites.

    Raises:
        UserError: Silos would have to be pooled, or trained together.
    """
    if strategy.pooled:
        raise UserError(
            f"federate.strategy.name = '{experiment.federate.strategy.name}': it pools the silos' data, "
            "which stay at their sites; use --engine local"
        )
    if experiment.federate.together > 1:
        raise UserError(
            f"federate.together = {experiment.federate.together}: sites train alone; set it to 1, as the "
            "bytes of a run depend on it"
        )


def refuse_over_ranks(experiment: Experiment, count: int) -> None:
    """Refuse what so many processes cannot train together.

    Raises:
        UserError: Naming the option.
    """
    options, start = experiment.federate, f"torchrun has started {count} processes"
    if experiment.align is not None and count > 1:
        raise UserError(f"[align]: {start}, and an alignment is of one; start it without torchrun")
    if options.all_reduce not in (None, count):
        raise UserError(
            f"federate.all_reduce = {options.all_reduce}: the run's bytes depend on so many processes, and "
            f"there {'is one' if count == 1 else f'are {count}'}; start it with torchrun --nproc-per-node "
            f"{options.all_reduce}, or remove the option"
        )
    if count == 1 and options.shard:
        raise UserError(
            "federate.shard = true: the LLM is spread over the processes that torchrun starts, and there is "
            "one; start it with torchrun, or remove the option"
        )
    if count == 1:
        return
    if options.together > 1:
        raise UserError(
            f"federate.together = {options.together}: {start}, which share the micro-batches of one client; "
            "set it to 1, as the bytes of a run depend on it"
        )
    if options.clipped is not None and options.clipped.unit != "client":
        raise UserError(
            f"federate.privacy.unit = '{options.clipped.unit}': {start}, and private steps clip gradients of "
            "samples and add noise in one; start it without torchrun"
        )
    if experiment.language.device_map != "none":
        raise UserError(
            f"language.device_map = '{experiment.language.device_map}': {start}, each with a GPU of its own; "
            "remove it, or start without torchrun"
        )
    for option, used in (
        ("federate.compile", options.compile),
        ("language.quantize", experiment.language.quantize != "none"),
    ):
        if options.shard and used:
            raise UserError(f"federate.shard = true: does not go with {option}; remove one of them")


def _refuse_insecure(options: Federate, schedule: Schedule, strategy: Strategy) -> None:
    """Refuse what cannot be done when the server sees sums alone."""
    where, name = "federate.privacy.secure", options.strategy.name
    if strategy.sees() == "updates" or strategy.pooled or strategy.personal:
        raise UserError(
            f"{where}: strategy '{name}', as configured, has to see every client's update; use one that "
            "needs only sums (docs/privacy.md)"
        )
    if options.optimizer.carry:
        raise UserError(f"{where}: moments that clients carry on would reveal their updates; remove carry")
    least = LEAST + strategy.releases() - 1
    fewest = min(map(len, schedule.rounds), default=least)
    if fewest < least:
        sums = "a sum" if least == LEAST else f"{strategy.releases()} sums of the same updates"
        raise UserError(
            f"{where}: {sums} over {fewest} clients hides nobody; at least {least} must take part"
        )
