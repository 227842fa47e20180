"""A few tokens prove that loss and answers are those of the whole model, or find ways in which they are.

The reference is the whole model on words alone. Ours has the embeddings of some of them as visual tokens,
so one comparison covers the splice, the scale of embeddings, what follows the head, and padding.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.models.decoding import decode, groups
from fedcmp.pipeline.models.prompts import IMAGE_TOKEN_INDEX, Tokens

if TYPE_CHECKING:
    from fedcmp.pipeline.models.language import FrozenLanguageModel

_PATCHES = 3
# Words after the image and before the answer. Between them lies more padding than ALiBi overlooks.
_QUESTIONS = (2, 18)
_ANSWER = 2
# The share of logits that rounding may change: of equal shapes, and of others (padding, one token at a time).
_EXACT = (1e-3, 1e-3)
_ROUNDED = (5e-2, 1e-1)
# A model that forbids a word gives it a logit beyond.
_NEVER = 1e4
_WINDOW = re.compile(r"sliding_window$|window_size$|chunk_size$|^local_attention|^attention_types$")


@dataclass(frozen=True)
class Ways:
    """How loss and answers of an LLM are computed.

    Attributes:
        whole: By the whole model, because it changes what its head says.
        scale: What word embeddings are multiplied by before visual tokens are put among them.
        cached: Answers keep a KV cache or another state from token to token.
        masked: Every step is given the mask of all tokens before it; else the first alone.
        padded: Prompts of unequal length are answered together.
        shared: Prompts about one image share the computation of its tokens.
    """

    whole: bool = False
    scale: float = 1.0
    cached: bool = True
    masked: bool = True
    padded: bool = True
    shared: bool = True

    @property
    def note(self) -> str:
        """What is slower than it could be, and why; nothing where all is as usual."""
        notes = []
        if self.whole:
            notes.append("its logits come from the whole model, which changes those of its head")
        if not self.cached:
            notes.append("its answers are computed without a cache, which does not give the same ones: slow")
        elif not self.padded:
            notes.append("prompts of unequal length are answered apart, because padding changes its answers")
        return "; ".join(notes)


@torch.no_grad()
def proven(language: FrozenLanguageModel) -> Ways:
    """The fastest ways that give what the whole model does.

    Raises:
        UserError: It cannot read embeddings in place of words, or sees what comes later.
    """
    case = _Case(language)
    model = language.model
    rounded = model.dtype != torch.float32 or getattr(model.config, "quantization_config", None) is not None
    equal, near = _ROUNDED if rounded else _EXACT
    # Falcon-H1 scales the embeddings of words, but not those that it is given.
    scales = dict.fromkeys((1.0, float(getattr(model.config.get_text_config(), "embedding_multiplier", 1.0))))
    for scale, whole in itertools.product(scales, (True,) if case.changed else (False, True)):
        language.ways = Ways(whole=whole, scale=scale, cached=False, padded=False, shared=False)
        if case.losses_differ() <= equal:
            return _answers(language, case, near)
    raise UserError(
        f"language.path = {language.path}: a {model.config.model_type} model {case.reason(equal)}"
    )


def _answers(language: FrozenLanguageModel, case: _Case, near: float) -> Ways:
    """The fastest way to answers; the slowest computes what the loss does, so it needs no proof."""
    ways = language.ways
    for padded, masked in itertools.product((True, False), (True, False)):
        language.ways = faster = replace(ways, cached=True, padded=padded, masked=masked)
        if case.answers_differ() <= near:
            break
    else:
        return ways
    if faster.padded and _attends_to_all(language.model.config.get_text_config()):
        language.ways = replace(faster, shared=True)
        if case.answers_differ() <= near:
            return language.ways
    return faster


def _attends_to_all(config: Any) -> bool:
    """Whether no layer has a window: it would count the padding between image and question.

    A few tokens fit into every window, so the configuration has to tell.
    """
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return set(layers) <= {"full_attention"}
    return not any(value for key, value in config.to_dict().items() if _WINDOW.search(key))


class _Case:
    """Two prompts of unequal length about two images, with answers, and what the whole model says to them.

    Attributes:
        changed: The whole model changes what its head says.

    Raises:
        UserError: It cannot be run, or its logits are not finite.
    """

    def __init__(self, language: FrozenLanguageModel) -> None:
        self._language, self._error = language, ""
        words = _words(language)
        image = torch.tensor([list(islice(words, _PATCHES)) for _ in _QUESTIONS])
        self._owners = [1, 0]
        self._image = image.to(language.device)
        start = next(words)
        self._samples = [
            Tokens([start, *[IMAGE_TOKEN_INDEX] * _PATCHES, *islice(words, length + _ANSWER)], [])
            for length in _QUESTIONS
        ]
        ids, _ = language.collate(self._samples)
        ids[ids == IMAGE_TOKEN_INDEX] = image[self._owners].flatten()
        for row, sample in enumerate(self._samples):
            after = range(len(sample.ids), ids.shape[1])
            ids[row, after.start :] = torch.tensor([next(words) for _ in after], dtype=ids.dtype)
        self._ids = ids.to(language.device)
        try:
            self.changed, self._wanted = self._whole()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UserError(f"language.path = {language.path}: cannot be run: {one_line(error)}") from None
        if bool(self._wanted.isnan().any()):
            raise UserError(
                f"language.path = {language.path}: its logits are not numbers in {language.model.dtype}; "
                "repair its weights, or change language.dtype"
            )

    def _whole(self) -> tuple[bool, Tensor]:
        """Whether what the head says is changed, and the whole model's logits `(2, length, vocabulary)`."""
        said: list[Tensor] = []

        def mark(module: Any, given: Any, output: Tensor) -> Tensor:
            said.append(output)
            return _marks(output)

        head, model = self._language.head, self._language.model
        hook = head.register_forward_hook(mark) if head is not None else None
        try:
            logits = model(input_ids=self._ids, use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        if len(said) == 1 and torch.equal(logits.float(), _marks(said[0]).float()):
            return False, said[0].float()
        return True, model(input_ids=self._ids, use_cache=False).logits.float()

    def losses_differ(self) -> float:
        """Share of the logits in which the loss departs from the whole model."""
        language, self._error = self._language, ""
        pairs = [
            (row, place)
            for row, sample in enumerate(self._samples)
            for place in range(_PATCHES, len(sample.ids))
        ]
        rows, places = torch.tensor(pairs, device=language.device).unbind(1)
        try:
            ids, _ = language.collate(self._samples)
            visual = language.words(self._image)[self._owners]
            ours = language.logits(language.embed(ids, visual), rows, places)
            return _difference(ours, self._wanted[rows, places])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._error = one_line(error)
            return math.inf

    def answers_differ(self) -> float:
        """Share of the logits in which answers depart from the whole model, which keeps no cache."""
        language = self._language
        prompts = [Tokens(sample.ids[:-_ANSWER], []) for sample in self._samples]
        worst = 0.0
        try:
            for group in groups(language, prompts):
                asked, owners = [prompts[row] for row in group], [self._owners[row] for row in group]
                steps = decode(language, asked, language.words(self._image), owners)
                token = None
                for step in range(_ANSWER + 1):
                    places = [len(prompt.ids) - 1 + step for prompt in asked]
                    worst = max(worst, _difference(steps.send(token), self._wanted[group, places]))
                    if step < _ANSWER:
                        following = [self._samples[row].ids[step - _ANSWER] for row in group]
                        token = torch.tensor(following, device=language.device)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return math.inf
        return worst

    def reason(self, equal: float) -> str:
        """Why there is no way to the loss."""
        if self._error:
            return f"cannot be run on embeddings: {self._error}"
        try:
            embeds = self._language.words(self._ids)
            ours = self._language.model(inputs_embeds=embeds, use_cache=False).logits
        except Exception as error:
            return f"cannot be run on embeddings: {one_line(error)}"
        if _difference(ours[1], self._wanted[1]) <= equal:
            return "sees later tokens, so it is not a causal LM; give another"
        return "takes more from words than embeddings, so visual tokens cannot stand among them; give another"


def _words(language: FrozenLanguageModel) -> Iterator[int]:
    """Ordinary token ids from all over the vocabulary, without end."""
    special = {
        *language.tokenizer.all_special_ids,
        language.pad_id,
        *_token_ids(language.model.config.to_dict()),
    }
    known = min(len(language.tokenizer), language.rows)
    ordinary = [token for token in range(known) if token not in special] or [0]
    step = max(1, round(len(ordinary) * 0.618))
    return (ordinary[place * step % len(ordinary)] for place in itertools.count())


def _token_ids(config: dict[str, Any]) -> Iterator[int]:
    """Token ids with a meaning of their own: every integer whose key says that it is one."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif "token" in str(key):
            yield from (
                each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)
            )


def _marks(logits: Tensor) -> Tensor:
    """Logits larger than any cap, which come back unchanged only where nothing follows the head."""
    marks = torch.linspace(-100, 100, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return marks.expand_as(logits)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest share of a position's logits, but for a constant, in which they differ; NaN is infinite."""
    ours, theirs = ours.float().to(theirs.device), theirs.float()
    never = theirs.abs() > _NEVER
    if not torch.equal(never, ours.abs() > _NEVER):
        return math.inf
    ours, theirs = ours.masked_fill(never, 0), theirs.masked_fill(never, 0)
    spread = (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1)
    share = (ours - theirs).norm(dim=-1) / spread
    return float(share.nan_to_num(nan=math.inf).max())
