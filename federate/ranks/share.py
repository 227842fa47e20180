"""Training clients over ranks: rank 0 asks, all of them train, and all must end in the same projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedcmp.federate.client.share import Part, Train
from fedcmp.federate.engines.wire import Payload, job_as_dict, job_of, pack, unpack
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.ranks.sums import Sums
from fedcmp.pipeline.cache import FeatureCache, differences
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import DivergedError, UserError
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models.device import device_type
from fedcmp.pipeline.models.projector import content_hash
from fedcmp.pipeline.ranks import Ranks

_DIVERGED = "diverged"


class Shared:
    """This process's share of every step; `Share` has the methods' documentation.

    Args:
        ranks: The processes.
        sums: How they add.
    """

    alone = False

    def __init__(self, ranks: Ranks, sums: Sums) -> None:
        self._ranks, self._sums = ranks, sums

    def summed(self, count: int, part: Part, like: Sequence[Tensor]) -> list[Tensor]:
        """Over all ranks."""
        return self._sums.summed(count, part, like)

    def merged(self, values: Tensor) -> Tensor:
        """Over all ranks."""
        return self._sums.merged(values)

    def trained(self, jobs: Sequence[Job], train: Train) -> list[LocalResult]:
        """Rank 0's results, once all have the same.

        Raises:
            DivergedError: As `train` raises it, in all ranks alike.
            UserError: Another rank has another projector.
        """
        said = pack([job_as_dict(job) for job in jobs])
        self._ranks.tell({"jobs": said.text}, said.tensors)
        with self._ranks.at_work():
            outcome = _outcome(jobs, train)
            mine = _content(outcome)
            for rank, answer in self._ranks.answers().items():
                if answer["content"] != mine:
                    raise UserError(
                        f"rank {rank} of {self._ranks.count} has trained another projector than rank 0; "
                        "give all ranks the same GPUs, drivers and releases"
                    )
        if isinstance(outcome, DivergedError):
            raise outcome
        return outcome

    def follow(self, train: Train) -> None:
        """Train what rank 0 asks for, until it ends."""
        while (message := self._ranks.told()) is not None:
            content, tensors = message
            jobs = [job_of(parts) for parts in unpack(Payload(content["jobs"], tensors))]
            with self._ranks.at_work():
                self._ranks.tell({"content": _content(_outcome(jobs, train))})


def _outcome(jobs: Sequence[Job], train: Train) -> list[LocalResult] | DivergedError:
    try:
        return train(jobs)
    except DivergedError as error:
        return error


def _content(outcome: list[LocalResult] | DivergedError) -> Any:
    if isinstance(outcome, DivergedError):
        return _DIVERGED
    return [content_hash(result.state) for result in outcome]


def agreed(experiment: Experiment, caches: Mapping[str, FeatureCache], device: str) -> dict[str, Any]:
    """What must be the same in all ranks, as JSON."""
    cuda = device_type(device) == "cuda"
    return {
        "experiment": run_identity(experiment),
        "caches": {silo: cache.content for silo, cache in caches.items()},
        "packages": provenance(device)["packages"],
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


def check_agreed(ours: Mapping[str, Any], theirs: Mapping[int, Mapping[str, Any]], count: int) -> None:
    """Require that all ranks have what rank 0 has.

    Raises:
        UserError: Naming the first rank that does not, and what.
    """
    for rank, said in theirs.items():
        if found := differences(ours, said):
            raise UserError(
                f"rank {rank} of {count} would train something else than rank 0 ({'; '.join(found)[:500]}); "
                "give all ranks the same files, releases, GPUs and threads"
            )
