"""How large a causal LM is, and what a step of training through it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedcmp.pipeline.config import Lora
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.lora import inject
from fedcmp.pipeline.models.saved_model import why_unloadable


@dataclass(frozen=True)
class Shape:
    """A causal LM.

    Attributes:
        parameters: All weights.
        blocks: Weights of its blocks.
        head: Weights of its head.
        attention: Width of the attention of all layers together.
        width: Width of its embeddings.
        adapter: Weights of the adapter that tunes it.
    """

    parameters: int
    blocks: int
    head: int
    attention: int
    width: int
    adapter: int = 0

    def size(self, bits: float) -> int:
        """Bytes in memory; only the blocks are quantised."""
        return int((self.blocks * bits + (self.parameters - self.blocks) * 16) / 8)

    def training_flops(self, tokens: int, predicted: int, checkpointing: bool) -> float:
        """A text forward, and backward to the embeddings: only an adapter's weights take a gradient.

        Attention has no weights; its backward pass costs 2.5 times the forward one (arXiv 2205.14135).

        Args:
            tokens: How many it has, visual ones included.
            predicted: How many of them are predicted.
            checkpointing: Whether the layers run twice.
        """
        weights, attention = 2 * self.blocks * tokens, 4 * self.attention * tokens**2
        again = weights + attention if checkpointing else 0
        return 2 * weights + 3.5 * attention + again + 4 * self.head * predicted + 6 * self.adapter * tokens


def language_shape(path: Path, adapter: Lora | None = None) -> Shape:
    """The shape of a causal LM from its configuration, and that of an adapter.

    Raises:
        UserError: There is no such configuration.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"language.path = {path}: no configuration of a causal LM: {why_unloadable(error)}"
        ) from None
    shape = shape_of(model)
    if adapter is None:
        return shape
    return replace(shape, adapter=sum(matrix.numel() for matrix in inject(model, adapter).values()))


def shape_of(model: Any) -> Shape:
    """The shape of a causal LM of transformers whose weights are neither quantised nor tuned."""
    text = model.config.get_text_config()
    # Recurrent ones have none.
    heads = getattr(text, "num_attention_heads", None) or 0
    width = heads and heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=sum(parameter.numel() for parameter in model.get_decoder().parameters()) - embeddings.numel(),
        head=0 if head is None else head.weight.numel(),
        attention=width * (getattr(text, "num_hidden_layers", None) or 0),
        width=embeddings.shape[1],
    )
