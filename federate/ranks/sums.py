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

    Raises:
        UserError: A GPU would have several ranks.
    """

    def __init__(self, ranks: Ranks, device: str, in_order: bool) -> None:
        self._rank, self._count, self._in_order = ranks.rank, ranks.count, in_order
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

    def summed(self, count: int, part: Part, like: Sequence[Tensor]) -> list[Tensor]:
        """As `Share.summed`."""
        total = self._ordered(count, part, like) if self._in_order else self._reduced(count, part, like)
        parts = total.split([each.numel() for each in like])
        return [each.view(shape.shape).clone() for each, shape in zip(parts, like, strict=True)]

    def merged(self, values: Tensor) -> Tensor:
        """As `Share.merged`: a number stays what it is, whatever zeros are added to it."""
        dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()

    def _ordered(self, count: int, part: Part, like: Sequence[Tensor]) -> Tensor:
        total = own = _zeros(like)
        for first in range(0, count, self._count):
            number = min(self._count, count - first)
            if self._rank < number:
                own = _flat(part(first + self._rank))
            if first == 0:
                total = torch.empty_like(own)
            for piece, sums in zip(own.split(_PIECE), total.split(_PIECE), strict=True):
                gathered = piece.new_empty(self._count * len(piece))
                dist.all_gather_into_tensor(gathered, piece.contiguous())
                for place, each in enumerate(gathered.view(self._count, -1)[:number]):
                    if first + place:
                        sums.add_(each)
                    else:
                        sums.copy_(each)
        return total

    def _reduced(self, count: int, part: Part, like: Sequence[Tensor]) -> Tensor:
        total = _zeros(like)
        for number in range(self._rank, count, self._count):
            total += _flat(part(number))
        dist.all_reduce(total)
        return total


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.reshape(-1) for each in tensors])


def _zeros(like: Sequence[Tensor]) -> Tensor:
    return _flat([torch.zeros_like(each, requires_grad=False) for each in like])
