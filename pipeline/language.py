"""The frozen LLM: visual tokens spliced into its input embeddings, loss, generation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError, one_line
from pipeline.prompts import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Tokens


class FrozenLanguageModel:
    """A causal LM of transformers whose parameters take no gradient.

    Args:
        path: Directory of a saved model with its tokenizer.
        dtype: `bfloat16` or `float32`.
        device: Where it runs.

    Raises:
        UserError: The directory is missing or does not hold such a model.
    """

    def __init__(self, path: Path, *, dtype: str, device: str) -> None:
        transformers_logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        except Exception as error:
            raise UserError(f"language.path = {path}: cannot be loaded: {one_line(error)}") from None
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._ends = _end_tokens(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        # Greedy means greedy: no penalty or sampling setting that the model ships with.
        self.model.generation_config = GenerationConfig()
        self.embeddings = self.model.get_input_embeddings()
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self.d_llm: int = self.embeddings.embedding_dim

    def embed(self, ids: Tensor, projected: Tensor) -> Tensor:
        """Splice projected visual tokens into word embeddings.

        Args:
            ids: `(batch, length)` int64 with `IMAGE_TOKEN_INDEX` at the visual tokens.
            projected: `(batch, patches, d_llm)`.

        Returns:
            `(batch, length, d_llm)` in the LLM's dtype.

        Raises:
            ValueError: A row has not exactly `patches` visual tokens.
        """
        visual = ids == IMAGE_TOKEN_INDEX
        if bool((visual.sum(1) != projected.shape[1]).any()):
            raise ValueError(f"every row needs exactly {projected.shape[1]} visual tokens")
        embeds = self.embeddings(ids.clamp(min=0))
        return embeds.masked_scatter(visual.unsqueeze(-1), projected.to(embeds.dtype))

    def token_losses(self, ids: Tensor, labels: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every supervised token; logits are computed only there.

        Rows are padded on the right, so causal attention needs no mask: what is supervised comes
        before the padding.

        Args:
            ids: `(batch, length)` int64.
            labels: `(batch, length)` int64, `IGNORE_INDEX` where nothing is predicted.
            projected: `(batch, patches, d_llm)`.

        Returns:
            Losses `(supervised,)` float32 and the row of each `(supervised,)` int64.
        """
        embeds = self.embed(ids, projected)
        hidden = self.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        rows, places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        logits = self.head(hidden[rows, places]).float()
        return cross_entropy(logits, targets[rows, places], reduction="none"), rows

    @torch.inference_mode()
    def generate(
        self, prompts: Tensor, attention: Tensor, projected: Tensor, *, max_new_tokens: int, stop: str | None
    ) -> list[str]:
        """Greedy decoding with a KV cache.

        Args:
            prompts: `(batch, length)` int64, padded on the left.
            attention: `(batch, length)`, 0 at padding.
            projected: `(batch, patches, d_llm)`.
            max_new_tokens: Tokens an answer may have.
            stop: A string that also ends an answer.

        Returns:
            The answers, stripped.
        """
        ends = self._ends | (self._newlines if stop == "\n" else set())
        output = self.model.generate(
            inputs_embeds=self.embed(prompts, projected),
            attention_mask=attention,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(ends),
            pad_token_id=self.pad_id,
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [(text.split(stop)[0] if stop else text).strip() for text in texts]

    @cached_property
    def _newlines(self) -> set[int]:
        """Tokens that are a newline and nothing else, as the usual tokenizers spell it."""
        vocabulary = self.tokenizer.get_vocab()
        return {vocabulary[word] for word in ("\n", "Ċ", "<0x0A>") if word in vocabulary}

    @property
    def pad_id(self) -> int:
        """A token id for padding; which one does not matter, since it is never attended to."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def collate(self, samples: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Ids and labels `(batch, length)` int64 on the device, padded on the right."""
        length = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), length), self.pad_id)
        labels = torch.full((len(samples), length), IGNORE_INDEX)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
            labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
        return ids.to(self.device), labels.to(self.device)

    def collate_prompts(self, samples: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask `(batch, length)` int64 on the device, padded on the left."""
        length = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), length), self.pad_id)
        attention = torch.zeros((len(samples), length), dtype=torch.int64)
        for row, sample in enumerate(samples):
            ids[row, length - len(sample.ids) :] = torch.tensor(sample.ids)
            attention[row, length - len(sample.ids) :] = 1
        return ids.to(self.device), attention.to(self.device)


@lru_cache(maxsize=1)
def load_language(path: Path, dtype: str, device: str, content: str) -> FrozenLanguageModel:
    """The frozen LLM, kept for the next run of this process.

    Args:
        path: Directory of a saved model with its tokenizer.
        dtype: `bfloat16` or `float32`.
        device: Where it runs.
        content: Fingerprint of its files; another one loads it again.
    """
    return FrozenLanguageModel(path, dtype=dtype, device=device)


def _end_tokens(*ids: int | list[int] | None) -> set[int]:
    """Every token id that ends an answer."""
    ends: set[int] = set()
    for each in ids:
        ends |= set(each) if isinstance(each, list) else {each} - {None}  # type: ignore[arg-type]
    return ends
