"""Sums over the ranks of a process group; the only file that calls torch's collectives.

Micro-batch i is of rank i mod N. In order, the gradients of N micro-batches at a time are gathered and added
one after the other, as one process adds them: whatever N is, the sum has the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from fedcmp.federate.client.share import Part
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.device import device_type
from fedcmp.pipeline.ranks import Ranks

Flat = dict[torch.dtype, Tensor]

# Numbers that are gathered from a rank at a time: 16 MB in float32.
_PIECE = 2**22
# Who is gone is noticed elsewhere; a layer may take minutes to be compiled.
_PATIENCE = timedelta(hours=2)


class Sums:
    """Sums that every rank gets, the same on each.

    Args:
        ranks: The processes.
        device: Where the tensors are.
        in_order: Add micro-batches in their order; else each rank adds its own, and these sums are
            added as is fastest.
        in_step: A rank without a micro-batch computes another's beside the others, as they wait for its share
            of the LLM.

    Raises:
        UserError: A GPU would have several ranks.
    """

    def __init__(self, ranks: Ranks, device: str, *, in_order: bool, in_step: bool = False) -> None:
        self._rank, self._count = ranks.rank, ranks.count
        self._in_order, self._in_step = in_order, in_step
        gpu = None
        if device_type(device) == "cuda":
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
            # Where each process is shown its own GPU alone, there is one.
            if here > gpus > 1:
                raise UserError(
                    f"torchrun has started {here} processes on a machine with {gpus} GPUs; lower "
                    "--nproc-per-node"
                )
            gpu = torch.device(device)
            torch.cuda.set_device(gpu)
        dist.init_process_group(
            "gloo" if gpu is None else "nccl",
            store=PrefixStore("sums", ranks.store),
            rank=ranks.rank,
            world_size=ranks.count,
            timeout=_PATIENCE,
            device_id=gpu,
        )
        ranks.at_end.append(dist.destroy_process_group)

    def summed(self, count: int, part: Part, like: Sequence[Tensor]) -> list[Tensor]:
        """As `Share.summed`."""
        total = (self._ordered if self._in_order else self._reduced)(count, part, _flat(like))
        parts = {dtype: iter(flat.split(_sizes(like, dtype))) for dtype, flat in total.items()}
        return [next(parts[each.dtype]).view(each.shape).clone() for each in like]

    def _ordered(self, count: int, part: Part, own: Flat) -> Flat:
        total = {dtype: torch.empty_like(flat) for dtype, flat in own.items()}
        for first in range(0, count, self._count):
            number = min(self._count, count - first)
            if self._rank < number:
                own = _flat(part(first + self._rank))
            elif self._in_step:
                part(first)
            for dtype, flat in own.items():
                for piece, sums in zip(flat.split(_PIECE), total[dtype].split(_PIECE), strict=True):
                    gathered = piece.new_empty(self._count * len(piece))
                    dist.all_gather_into_tensor(gathered, piece.contiguous())
                    for place, each in enumerate(gathered.view(self._count, -1)[:number]):
                        if first + place:
                            sums.add_(each)
                        else:
                            sums.copy_(each)
        return total

    def _reduced(self, count: int, part: Part, like: Flat) -> Flat:
        total = {dtype: torch.zeros_like(flat) for dtype, flat in like.items()}
        for first in range(0, count, self._count):
            if first + self._rank < count:
                for dtype, flat in _flat(part(first + self._rank)).items():
                    total[dtype] += flat
            elif self._in_step:
                part(first)
        for flat in total.values():
            dist.all_reduce(flat)
        return total


def _flat(tensors: Sequence[Tensor]) -> Flat:
    """All numbers of a dtype in one row."""
    rows: dict[torch.dtype, list[Tensor]] = {}
    for each in tensors:
        rows.setdefault(each.dtype, []).append(each.detach().reshape(-1))
    return {dtype: torch.cat(row) for dtype, row in rows.items()}


def _sizes(like: Sequence[Tensor], dtype: torch.dtype) -> list[int]:
    return [each.numel() for each in like if each.dtype == dtype]
