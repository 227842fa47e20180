"""The frozen LLM: visual tokens spliced into its input embeddings, loss, answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer

from fedcmp.pipeline.config import Lora
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.decoding import arguments, greedy
from fedcmp.pipeline.models.device import moved
from fedcmp.pipeline.models.loading import load_model, load_tokenizer
from fedcmp.pipeline.models.lora import inject
from fedcmp.pipeline.models.prompts import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Tokens, end_of_turn
from fedcmp.pipeline.models.proof import Ways, proven
from fedcmp.pipeline.models.shape import language_shape, shape_of


class FrozenLanguageModel:
    """A causal LM of transformers whose parameters take no gradient.

    A few tokens prove at loading that loss and answers are those of the whole model.

    Args:
        path: Directory of a saved model with its tokenizer.
        dtype: `bfloat16` or `float32`.
        device: Where it runs.
        quantize: `8bit` or `4bit` (NF4) weights by bitsandbytes, or `none`.
        device_map: `auto` spreads its layers over all GPUs, and main memory after them; `none`
            keeps them together.
        adapter: Tunes it, too.

    Attributes:
        adapter: The matrices that tune it, by name.
        shape: How large it is.
        checkpointing: Keep only the layers' inputs for the backward pass and run them again in it.
        compiled: Train through torch.compile.
        ways: How loss and answers are computed.
        rows: Rows of its word embeddings: token ids are below.
        layers: Those that can be checkpointed, compiled and sharded one by one; none where transformers does
            not say what they are.

    Raises:
        UserError: The directory is missing or does not hold such a model with all of its weights, a
            package is missing, or its loss cannot be computed from embeddings.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str,
        device: str,
        quantize: str = "none",
        device_map: str = "none",
        adapter: Lora | None = None,
    ) -> None:
        self.path, self.checkpointing, self.compiled = path, False, False
        model, placed = load_model(path, dtype=dtype, device=device, quantize=quantize, device_map=device_map)
        self.tokenizer = load_tokenizer(path)
        self.model: Any = model
        self._ends = _end_tokens(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        self._ends |= end_of_turn(self.tokenizer)
        self.embeddings = self.model.get_input_embeddings()
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self.rows = len(self.embeddings.weight)
        self.device = self.embeddings.weight.device if placed else torch.device(device)
        self.layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        if self.layers:
            # Before transformers 5.2x it had the second name.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            getattr(model, next(name for name in names if hasattr(model, name)))({"use_reentrant": False})
        self.d_llm: int = self.embeddings.embedding_dim
        self.ways = Ways()
        self.ways = proven(self)
        self.shape = shape_of(model) if quantize == "none" else language_shape(path)
        self.adapter = {} if adapter is None else inject(model, adapter)
        self.shape = replace(self.shape, adapter=sum(matrix.numel() for matrix in self.adapter.values()))

    def at_most(self, length: int) -> int:
        """A number of tokens, or that of the positions which the model was made for where these are fewer."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(length, positions) if isinstance(positions, int) and positions > 0 else length

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
        embeds = self.words(self._here(ids.clamp(min=0)))
        return embeds.masked_scatter(self._here(visual).unsqueeze(-1), projected.to(embeds.dtype))

    def _here(self, tensor: Tensor) -> Tensor:
        """On the device."""
        return moved(tensor, self.device)

    def words(self, ids: Tensor) -> Tensor:
        """Embeddings of words `(*ids.shape, d_llm)` as visual tokens stand among them."""
        embeds = self.embeddings(ids)
        return embeds if self.ways.scale == 1 else embeds * self.ways.scale

    def token_losses(self, ids: Tensor, labels: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every supervised token; logits are computed only there.

        Rows are padded on the right, so causal attention needs no mask: what is supervised comes
        before the padding. With ids and labels on the CPU nothing here waits for a GPU.

        Args:
            ids: `(batch, length)` int64.
            labels: `(batch, length)` int64, `IGNORE_INDEX` where nothing is predicted.
            projected: `(batch, patches, d_llm)`.

        Returns:
            Losses `(supervised,)` float32 and the row of each `(supervised,)` int64, on the device.
        """
        targets = labels[:, 1:]
        rows, places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
        wanted = self._here(targets[rows, places])
        rows, places = self._here(rows), self._here(places)
        logits = self.logits(self.embed(ids, projected), rows, places).float()
        return cross_entropy(logits.to(self.device), wanted, reduction="none"), rows

    def logits(self, embeds: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Logits of the tokens that follow some places.

        Args:
            embeds: `(batch, length, d_llm)`, padded on the right.
            rows: `(n,)` int64.
            places: `(n,)` int64.

        Returns:
            `(n, vocabulary)` in the LLM's dtype.
        """
        with self._training() as body:
            if not self.ways.whole:
                hidden = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
                return self.head(hidden[rows.to(hidden.device), places.to(hidden.device)])
            # The same columns of every row: a sample's supervised tokens lie side by side.
            columns, places = places.unique(return_inverse=True)
            keep = {"logits_to_keep": columns} if "logits_to_keep" in arguments(self.model) else {}
            logits = body(inputs_embeds=embeds, use_cache=False, **keep).logits
            logits = logits if keep else logits[:, columns.to(logits.device)]
            return logits[rows.to(logits.device), places.to(logits.device)]

    def hidden(self, embeds: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Last hidden states at some places, as what predicts tokens takes them.

        Args:
            embeds: `(batch, length, d_llm)`, padded on the right.
            rows: `(n,)` int64.
            places: `(n,)` int64.

        Returns:
            `(n, d_llm)` float32.
        """
        with self._training() as body:
            if self.ways.whole:
                output = body(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
                states = output.hidden_states[-1]
            else:
                states = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return states[rows.to(states.device), places.to(states.device)].float()

    @property
    def body(self) -> Any:
        """What takes embeddings: the decoder, or the whole model where it changes what its head says."""
        return self.model if self.ways.whole else self.decoder

    @cached_property
    def _compiled(self) -> list[Any]:
        """Every layer, compiled: one by one they share their code, so it takes seconds instead of minutes."""
        calls = []
        for layer in self.layers:
            layer.compile()
            calls.append(layer._compiled_call_impl)
            layer._compiled_call_impl = None
        return calls

    @cached_property
    def _compiled_body(self) -> Any:
        """What takes embeddings, compiled as a whole where its layers cannot be identified."""
        return self.body if self.layers else torch.compile(self.body)

    @contextmanager
    def _training(self) -> Iterator[Any]:
        """What takes embeddings, ready to train: answers are neither checkpointed nor compiled.

        Layers checkpoint only while they think they train; their dropout stays off all the same.
        """
        for layer in self.layers:
            layer.training = self.checkpointing and torch.is_grad_enabled()
        if self.compiled:
            for layer, call in zip(self.layers, self._compiled, strict=True):
                layer._compiled_call_impl = call
        try:
            yield self._compiled_body if self.compiled else self.body
        finally:
            for layer in self.layers:
                layer.training, layer._compiled_call_impl = False, None

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
        """Greedy answers; prompts about one image share the computation of its tokens.

        Args:
            samples: Prompts.
            projected: `(images, patches, d_llm)`.
            owners: The image of each prompt.
            max_new_tokens: Tokens an answer may have.
            stop: A string that also ends an answer.

        Returns:
            The answers, stripped.
        """
        ends = self.ends(stop)
        answers = greedy(self, samples, projected, owners, length=max_new_tokens, ends=ends)
        return self.said(answers, stop)

    def ends(self, stop: str | None) -> set[int]:
        """Tokens that end an answer, those of a string that also does among them."""
        return self._ends | (self._newlines if stop == "\n" else set())

    def said(self, answers: Sequence[Sequence[int]], stop: str | None) -> list[str]:
        """Answers as texts, stripped, up to a string that ends them."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
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
            if token is not None and token < self.rows:
                return int(token)
        return 0

    def collate(self, samples: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
        """Ids and labels `(batch, length)` int64 on the CPU, padded on the right.

        Raises:
            UserError: A token id has no row in the word embeddings.
        """
        length = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), length), self.pad_id)
        labels = torch.full((len(samples), length), IGNORE_INDEX)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
            labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
        self.check(ids)
        return ids, labels

    def collate_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask `(batch, length)` int64 on the device, padded on the left.

        Raises:
            UserError: A token id has no row in the word embeddings.
        """
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad_id)
        attention = torch.zeros((len(rows), length), dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, length - len(row) :] = torch.tensor(row)
            attention[place, length - len(row) :] = 1
        self.check(ids)
        return ids.to(self.device), attention.to(self.device)

    def check(self, ids: Tensor) -> None:
        """Every token id needs a row in the word embeddings.

        Raises:
            UserError: One has none.
        """
        highest = int(ids.max()) if ids.numel() else 0
        if highest >= self.rows:
            word = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"language.path = {self.path}: its tokenizer has token {highest} ({word!r}), but its word "
                f"embeddings have {self.rows} rows; give the tokenizer that the model was trained with"
            )


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
        if note := _loaded[key].ways.note:
            say(f"language.path = {path}: {note}")
    return _loaded[key]


def _end_tokens(*ids: int | list[int] | None) -> set[int]:
    """Every token id that ends an answer."""
    ends: set[int] = set()
    for each in ids:
        ends |= set(each) if isinstance(each, list) else {each} - {None}  # type: ignore[arg-type]
    return ends
