"""What ranks other than 0 do in stage two: they train what rank 0 asks for, and write nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial

from fedcmp.federate.client.clients import Clients
from fedcmp.federate.client.texts import check_texts
from fedcmp.federate.compatible import refuse_over_ranks
from fedcmp.federate.ranks.share import Shared, agreed, check_agreed
from fedcmp.federate.ranks.sums import Sums
from fedcmp.federate.schedule import Schedule, schedule_of
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.cache import FeatureCache, open_cache
from fedcmp.pipeline.config import Experiment, Federate
from fedcmp.pipeline.console import say
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.ranks import Ranks


def led(
    experiment: Experiment, schedule: Schedule, caches: Mapping[str, FeatureCache], ranks: Ranks
) -> tuple[Clients, Shared]:
    """Rank 0's clients, and its share of their steps; all ranks load the LLM at the same time.

    Raises:
        UserError: As `Clients`, or another rank has other files, releases or GPUs.
    """
    refuse_over_ranks(experiment, ranks.count)
    _say_idle(experiment.federate, ranks.count)
    ranks.tell({"begin": True})

    def left_out(language: FrozenLanguageModel, visual_tokens: int) -> Mapping[str, dict[int, str]]:
        found = check_texts(experiment, caches, language, visual_tokens)
        ranks.tell({"without": found})
        return found

    clients = Clients(experiment, schedule, caches, left_out)
    check_agreed(agreed(experiment, caches, clients.device), ranks.answers(), ranks.count)
    ranks.tell({"agreed": True})
    return clients, _shared(experiment, clients, ranks)


def follow(load: Callable[[], Experiment], silo: str | None, ranks: Ranks) -> None:
    """Take part in the training until rank 0 ends.

    Args:
        load: Reads the experiment, once rank 0 has found it in order.
        silo: The only one that is here; None where all are.
        ranks: The processes.

    Raises:
        UserError: As `Clients`.
    """
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        if ranks.told() is None:
            return
        experiment = load()
        schedule = schedule_of(
            experiment, STRATEGIES.build(experiment.federate.strategy, "federate.strategy")
        )
        silos = experiment.federate.silos if silo is None else (silo,)
        caches = {name: open_cache(experiment, name) for name in silos}
        clients = Clients(experiment, schedule, caches, partial(_told, ranks))
        ranks.tell(agreed(experiment, caches, clients.device))
        if ranks.told() is None:
            return
        share = _shared(experiment, clients, ranks)
        share.follow(clients.trainer(share=share).train)


def _say_idle(options: Federate, count: int) -> None:
    parts = -(-options.batch_size // (options.micro_batch or options.batch_size))
    if options.micro_tokens is None and parts % count:
        say(
            f"a step of {parts} micro-batches is uneven work for {count} ranks; federate.micro_batch = "
            f"{max(options.batch_size // count, 1)} gives each one"
        )


def _shared(experiment: Experiment, clients: Clients, ranks: Ranks) -> Shared:
    options = experiment.federate
    with ranks.at_work():
        in_order = options.all_reduce is None
        sums = Sums(ranks, clients.device, in_order=in_order, in_step=options.shard)
        if options.shard:
            from fedcmp.federate.ranks.sharding import shard

            shard(clients.language, clients.device, ranks.count)
        return Shared(ranks, sums)


def _told(ranks: Ranks, language: FrozenLanguageModel, visual_tokens: int) -> Mapping[str, dict[int, str]]:
    """The texts that rank 0 has found."""
    message = ranks.told()
    if message is None:
        raise SystemExit(0)
    return {
        silo: {int(index): reason for index, reason in found.items()}
        for silo, found in message[0]["without"].items()
    }
