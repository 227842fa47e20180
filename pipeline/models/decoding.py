"""Answers of the frozen LLM, the likeliest or drawn, in the fastest of the ways that are proven for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fedcmp.pipeline.models.prompts import IMAGE_TOKEN_INDEX, Tokens

if TYPE_CHECKING:
    from fedcmp.pipeline.models.language import FrozenLanguageModel

# What a model calls its state, as an argument and in its output: transformers 5.24 renamed the first two.
_STATES = ("cache", "past_key_values", "cache_params", "state")

Steps = Generator[Tensor, Tensor | None, None]
T = TypeVar("T")


def greedy(
    language: FrozenLanguageModel,
    samples: Sequence[Tokens],
    projected: Tensor,
    owners: Sequence[int],
    *,
    length: int,
    ends: set[int],
) -> list[list[int]]:
    """Token ids of the likeliest answer, token by token, up to and with the first that ends it.

    Args:
        language: The frozen LLM.
        samples: Prompts.
        projected: `(images, patches, d_llm)`.
        owners: The image of each prompt.
        length: Tokens an answer may have.
        ends: Tokens that end an answer.
    """
    return _answers(language, samples, projected, owners, 1, length, ends, lambda logits: logits.argmax(-1))


def drawn(
    language: FrozenLanguageModel,
    samples: Sequence[Tokens],
    projected: Tensor,
    owners: Sequence[int],
    *,
    copies: int,
    length: int,
    ends: set[int],
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """As `greedy`, but drawn from softmax(logits / temperature), several for each prompt side by side.

    Drawn by the Gumbel-max trick, so that answers go to the likeliest ones as the temperature goes to zero.

    Args:
        language: The frozen LLM.
        samples: Prompts.
        projected: `(images, patches, d_llm)`.
        owners: The image of each prompt.
        copies: Answers to each prompt, which is computed once for them.
        length: Tokens an answer may have.
        ends: Tokens that end an answer.
        temperature: Above zero.
        generator: On the CPU.
    """

    def choose(logits: Tensor) -> Tensor:
        uniform = torch.rand(logits.shape, generator=generator).clamp(min=torch.finfo(torch.float32).tiny)
        noise = -torch.log(-torch.log(uniform))
        return (logits.float() / temperature + noise.to(logits.device)).argmax(-1)

    return _answers(language, samples, projected, owners, copies, length, ends, choose)


def _answers(
    language: FrozenLanguageModel,
    samples: Sequence[Tokens],
    projected: Tensor,
    owners: Sequence[int],
    copies: int,
    length: int,
    ends: set[int],
    choose: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """`copies` answers to each prompt; next tokens are chosen by their logits `(answers, vocabulary)`."""
    answers: list[list[int]] = [[] for _ in range(copies * len(samples))]
    ending = torch.tensor(sorted(ends), dtype=torch.int64, device=language.device)
    for group in groups(language, samples):
        said: list[Tensor] = []
        finished = torch.zeros(copies * len(group), dtype=torch.bool, device=language.device)
        asked, shown = [samples[row] for row in group], [owners[row] for row in group]
        steps = decode(language, asked, projected, shown, copies)
        for _ in range(length):
            said.append(choose(steps.send(said[-1] if said else None)).to(language.device))
            finished |= torch.isin(said[-1], ending)
            if bool(finished.all()):
                break
        rows = [copies * row + copy for row in group for copy in range(copies)]
        for row, tokens in zip(rows, torch.stack(said, 1).tolist(), strict=True):
            answers[row] = _until(tokens, ends)
    return answers


def decode(
    language: FrozenLanguageModel,
    samples: Sequence[Tokens],
    projected: Tensor,
    owners: Sequence[int],
    copies: int = 1,
) -> Steps:
    """Logits `(answers, vocabulary)` of the next token, and after every token sent `(answers,)` again.

    Every prompt has `copies` answers, one after the other.
    """
    if not language.ways.shared:
        samples, owners = _repeated(samples, copies), _repeated(owners, copies)
    if not language.ways.cached:
        return _without_state(language, samples, projected, owners)
    return _with_state(language, samples, projected, owners, copies if language.ways.shared else 1)


def _repeated(each: Sequence[T], copies: int) -> list[T]:
    return [item for item in each for _ in range(copies)]


def arguments(module: Any) -> dict[str, inspect.Parameter]:
    """The arguments that a module's forward declares, by name."""
    return dict(inspect.signature(type(module).forward).parameters)


def _with_state(
    language: FrozenLanguageModel,
    samples: Sequence[Tokens],
    projected: Tensor,
    owners: Sequence[int],
    copies: int,
) -> Steps:
    """With a KV cache or another state; prompts of unequal length are padded on the left."""
    taken = arguments(language.body)
    open_ = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    name = next(name for name in _STATES if name in taken)

    def run(**given: Any) -> Any:
        if language.ways.whole and "logits_to_keep" in taken:
            given["logits_to_keep"] = 1
        return language.body(
            use_cache=True, **{key: value for key, value in given.items() if open_ or key in taken}
        )

    shared = _shared(samples) if language.ways.shared else 0
    rest, attention = language.collate_left([sample.ids[shared:] for sample in samples])
    state = None
    if shared:
        start = torch.tensor(samples[0].ids[:shared], device=language.device).expand(len(projected), -1)
        state = run(inputs_embeds=language.embed(start, projected))[name]
        state.batch_select_indices(torch.tensor(owners))
        attention = torch.cat([attention.new_ones(len(samples), shared), attention], 1)
        embeds = language.words(rest)
    else:
        embeds = language.embed(rest, projected[list(owners)])
    positions = (attention.cumsum(1) - 1).clamp(min=0)[:, shared:]
    while True:
        masks = {"attention_mask": attention} if state is None or language.ways.masked else {}
        output = run(inputs_embeds=embeds, position_ids=positions, **masks, **{name: state})
        state, whole = output[name], language.ways.whole
        logits = output.logits[:, -1] if whole else language.head(output.last_hidden_state[:, -1])
        if copies > 1 and len(logits) == len(samples):
            each = torch.arange(len(samples), device=language.device).repeat_interleave(copies)
            state.batch_select_indices(each)
            logits, attention, positions = logits[each.to(logits.device)], attention[each], positions[each]
        tokens = yield logits
        assert tokens is not None
        embeds = language.words(tokens[:, None])
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], 1)
        positions = positions[:, -1:] + 1


def _without_state(
    language: FrozenLanguageModel, samples: Sequence[Tokens], projected: Tensor, owners: Sequence[int]
) -> Steps:
    """Everything is computed again for every token, as in training: prompts are padded on the right."""
    rows, visual = [list(sample.ids) for sample in samples], projected[list(owners)]
    order = torch.arange(len(rows), device=language.device)
    while True:
        ids, _ = language.collate([Tokens(row, []) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows], device=language.device)
        tokens = yield language.logits(language.embed(ids, visual), order, last)
        assert tokens is not None
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)


def groups(language: FrozenLanguageModel, samples: Sequence[Tokens]) -> list[list[int]]:
    """Which prompts are decoded together: all, or those of one length where padding changes answers."""
    if language.ways.padded or not language.ways.cached:
        return [list(range(len(samples)))]
    lengths: dict[int, list[int]] = {}
    for row, sample in enumerate(samples):
        lengths.setdefault(len(sample.ids), []).append(row)
    return list(lengths.values())


def _shared(samples: Sequence[Tokens]) -> int:
    """Tokens up to the end of the image if all prompts begin with the same ones and go on, else 0."""
    first = samples[0].ids
    end = len(first) - first[::-1].index(IMAGE_TOKEN_INDEX)
    same = all(len(sample.ids) > end and sample.ids[:end] == first[:end] for sample in samples)
    return end if same else 0


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens up to and with the first that ends an answer."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]
