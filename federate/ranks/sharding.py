"""The frozen LLM's layers spread over ranks, for LLMs that no GPU has room for.

Each rank keeps a share of every layer (torch's `fully_shard`) and has a layer whole while it is computed, so
all ranks go through the layers at the same time.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.device import device_type
from fedcmp.pipeline.models.language import FrozenLanguageModel


def shard(language: FrozenLanguageModel, device: str, count: int) -> None:
    """Spread an LLM in main memory over the devices of the process group, layer by layer.

    Raises:
        UserError: Its layers cannot be identified.
    """
    if not language.layers:
        raise UserError(
            f"language.path = {language.path}: federate.shard: transformers does not say what its layers "
            "are; use language.quantize, or language.device_map without torchrun"
        )
    mesh = init_device_mesh(device_type(device), (count,))
    for layer in language.layers:
        fully_shard(layer, mesh=mesh)
    language.model.to(device)
    language.device = torch.device(device)
