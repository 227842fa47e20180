"""The frozen LLM: visual tokens spliced into its input embeddings, loss, generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError
from pipeline.prompts import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Tokens
from pipeline.saved_model import why_unloadable


class FrozenLanguageModel:
    """A causal LM of transformers whose parameters take no gradient.

    Args:
        path: Directory of a saved model with its tokenizer.
        dtype: `bfloat16` or `float32`.
        device: Where it runs.
        quantize: `8bit` or `4bit` (NF4) weights by bitsandbytes, or `none`.
        device_map: `auto` spreads its layers over all GPUs, and main memory after them; `none`
            keeps them together.

    Attributes:
        checkpointing: Keep only the layers' inputs for the backward pass and run them again in it.
        compiled: Train through torch.compile.

    Raises:
        UserError: The directory is missing or does not hold such a model with all of its weights, or a
            package is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str,
        device: str,
        quantize: str = "none",
        device_map: str = "none",
    ) -> None:
        self.checkpointing = self.compiled = False
        transformers_logging.disable_progress_bar()
        placed = _placement(quantize, device_map, device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                quantization_config=_quantization(quantize, dtype),
                device_map=placed,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except Exception as error:
            raise UserError(f"language.path = {path}: cannot be loaded: {why_unloadable(error)}") from None
        model, report = loaded
        if report["missing_keys"]:
            missing = min(report["missing_keys"])
            raise UserError(
                f"language.path = {path}: {missing} is missing from its weights and would be random; give "
                "the whole causal LM"
            )
        self.model: Any = (model if placed else model.to(device)).eval().requires_grad_(False)
        self._ends = _end_tokens(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        self.embeddings = self.model.get_input_embeddings()
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self.device = self.embeddings.weight.device if placed else torch.device(device)
        self._layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        # Before transformers 5.2x it had the second name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        getattr(model, next(name for name in names if hasattr(model, name)))({"use_reentrant": False})
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
        with self._checkpointing():
            decoder = self._compiled_decoder if self.compiled else self.decoder
            hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        rows, places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        logits = self.head(hidden[rows.to(hidden.device), places.to(hidden.device)]).float()
        return cross_entropy(logits.to(ids.device), targets[rows, places], reduction="none"), rows

    @cached_property
    def _compiled_decoder(self) -> Any:
        return torch.compile(self.decoder)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Layers checkpoint only while they think they train; their dropout stays off all the same."""
        for layer in self._layers:
            layer.training = self.checkpointing and torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.training = False

    @torch.inference_mode()
    def generate(
        self,
        samples: Sequence[Tokens],
        projected: Tensor,
        owners: Sequence[int],
        *,
        max_new_tokens: int,
        stop: str | None,
    ) -> list[str]:
        """Greedy decoding with a KV cache; prompts about one image share the computation of its tokens.

        Args:
            samples: Prompts.
            projected: `(images, patches, d_llm)`.
            owners: The image of each prompt.
            max_new_tokens: Tokens an answer may have.
            stop: A string that also ends an answer.

        Returns:
            The answers, stripped.
        """
        ends = self._ends | (self._newlines if stop == "\n" else set())
        ending = torch.tensor(sorted(ends), dtype=torch.int64, device=self.device)
        shared = self._shared(samples)
        rest, attention = self._collate_left([sample.ids[shared:] for sample in samples])
        cache = None
        if shared:
            start = torch.tensor(samples[0].ids[:shared], device=self.device).expand(len(projected), -1)
            cache = self.decoder(inputs_embeds=self.embed(start, projected), use_cache=True).past_key_values
            cache.batch_select_indices(torch.tensor(owners))
            attention = torch.cat([attention.new_ones(len(samples), shared), attention], 1)
            embeds = self.embeddings(rest)
        else:
            embeds = self.embed(rest, projected[list(owners)])
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, shared:]
        said: list[Tensor] = []
        finished = torch.zeros(len(samples), dtype=torch.bool, device=self.device)
        for _ in range(max_new_tokens):
            output = self.decoder(
                inputs_embeds=embeds,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            said.append(self.head(output.last_hidden_state[:, -1]).argmax(-1).to(self.device))
            finished |= torch.isin(said[-1], ending)
            if bool(finished.all()):
                break
            cache, embeds = output.past_key_values, self.embeddings(said[-1][:, None])
            attention = torch.cat([attention, attention.new_ones(len(samples), 1)], 1)
            positions = positions[:, -1:] + 1
        answers = [_until(row, ends) for row in torch.stack(said, 1).tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [(text.split(stop)[0] if stop else text).strip() for text in texts]

    def _shared(self, samples: Sequence[Tokens]) -> int:
        """Tokens up to the end of the image if all prompts begin with the same ones and go on, else 0.

        Only with full attention: a sliding window would count the padding between image and question.
        """
        config = self.model.config.get_text_config()
        window = None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)
        if window is not None or {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
            return 0
        first = samples[0].ids
        end = len(first) - first[::-1].index(IMAGE_TOKEN_INDEX)
        same = all(len(sample.ids) > end and sample.ids[:end] == first[:end] for sample in samples)
        return end if same else 0

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

    def _collate_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask `(batch, length)` int64 on the device, padded on the left."""
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad_id)
        attention = torch.zeros((len(rows), length), dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, length - len(row) :] = torch.tensor(row)
            attention[place, length - len(row) :] = 1
        return ids.to(self.device), attention.to(self.device)


_loaded: dict[tuple[Any, ...], FrozenLanguageModel] = {}


def load_language(path: Path, content: str, **options: Any) -> FrozenLanguageModel:
    """The frozen LLM, kept for the next run of this process; the one before is let go first.

    Args:
        path: Directory of a saved model with its tokenizer.
        content: Fingerprint of its files; another one loads it again.
        **options: Of `FrozenLanguageModel`.
    """
    key = (path, content, *sorted(options.items()))
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = FrozenLanguageModel(path, **options)
    return _loaded[key]


def _placement(quantize: str, device_map: str, device: str) -> Any:
    """What transformers is told about devices; None where the model is moved as a whole.

    Raises:
        UserError: A package is missing.
    """
    for package, key, value in (
        ("bitsandbytes", "quantize", quantize),
        ("accelerate", "device_map", device_map),
    ):
        if value != "none" and find_spec(package) is None:
            raise UserError(f"language.{key} = '{value}': needs {package}; run: pip install 'fedcmp[large]'")
    if device_map != "none":
        return device_map
    return {"": device} if quantize != "none" else None


def _quantization(quantize: str, dtype: str) -> BitsAndBytesConfig | None:
    if quantize == "none":
        return None
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )


def _end_tokens(*ids: int | list[int] | None) -> set[int]:
    """Every token id that ends an answer."""
    ends: set[int] = set()
    for each in ids:
        ends |= set(each) if isinstance(each, list) else {each} - {None}  # type: ignore[arg-type]
    return ends


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens up to and with the first that ends an answer."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]
