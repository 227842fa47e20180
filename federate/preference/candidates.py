"""Answers to questions about pictures as token ids: what rewards judge, and what policies are trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import (
    CAPTION_PROMPT,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    BadTextError,
    Tokens,
    question,
    stop_string,
    tokenise_all,
)
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.records import Text, Turn


@dataclass(frozen=True)
class Candidates:
    """Answers with what they are answers to.

    Attributes:
        features: `(pictures, patches, d_vision)` float32, on the LLM's device.
        owners: `(answers,)` int64 on the CPU: the picture of each answer.
        texts: The text that each answer's question is from, with its own answers.
        prompts: Token ids of each question.
        answers: Token ids of each answer, with what ended it.
    """

    features: Tensor
    owners: Tensor
    texts: Sequence[Text]
    prompts: Sequence[Tokens]
    answers: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.answers)

    def by_length(self, size: int) -> list[list[int]]:
        """Answers of similar length with their prompts, so many at once."""
        prompts = [len(prompt.ids) for prompt in self.prompts]
        lengths = [prompt + len(answer) for prompt, answer in zip(prompts, self.answers, strict=True)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def part(self, rows: Sequence[int]) -> Candidates:
        """Some answers, with their pictures alone."""
        pictures, owners = self.owners[list(rows)].unique(return_inverse=True)
        return Candidates(
            self.features[pictures.to(self.features.device)],
            owners,
            [self.texts[row] for row in rows],
            [self.prompts[row] for row in rows],
            [self.answers[row] for row in rows],
        )


@dataclass(frozen=True)
class Asking:
    """How questions become token ids, and token ids answers: captions by one template, all else by another.

    Attributes:
        language: The LLM.
        template: Of captions.
        question_template: Of everything that is asked.
        max_length: Tokens that a question with its answer may have.
        visual_tokens: Tokens of a picture.
    """

    language: FrozenLanguageModel
    template: str
    question_template: str
    max_length: int
    visual_tokens: int

    @classmethod
    def of(cls, experiment: Experiment, language: FrozenLanguageModel, visual_tokens: int) -> Asking:
        """As an experiment asks."""
        options = experiment.language
        length = language.at_most(options.max_length)
        return cls(language, options.template, options.question_template, length, visual_tokens)

    def template_of(self, text: Text) -> str:
        """The template of a text's question."""
        return self.template if len(text.turns) == 1 else self.question_template

    def prompts(self, texts: Sequence[Text]) -> list[Tokens]:
        """Questions without their answers."""
        return self._tokens(
            [Text(text.turns[:-1] or question(CAPTION_PROMPT).turns) for text in texts], texts
        )

    def answers(self, texts: Sequence[Text], said: Sequence[str]) -> list[tuple[Tokens, list[int]]]:
        """Questions, and other last answers to them as they would be trained on."""
        whole = [
            Text((*text.turns[:-1], Turn("assistant", answer)))
            for text, answer in zip(texts, said, strict=True)
        ]
        return [_divided(tokens) for tokens in self._tokens(whole, texts)]

    def said(self, candidates: Candidates) -> list[str]:
        """Answers as texts."""
        told = []
        for text, answer in zip(candidates.texts, candidates.answers, strict=True):
            told += self.language.said([answer], stop_string(self.template_of(text)))
        return told

    def ends(self, text: Text) -> set[int]:
        """Tokens that end an answer to a text's question."""
        return self.language.ends(stop_string(self.template_of(text)))

    def _tokens(self, written: Sequence[Text], texts: Sequence[Text]) -> list[Tokens]:
        """Each by the template of the text that it is made of."""
        tokens: list[Tokens | None] = [None] * len(texts)
        templates = [self.template_of(text) for text in texts]
        for template in dict.fromkeys(templates):
            places = [place for place, own in enumerate(templates) if own == template]
            made = tokenise_all(
                [written[place] for place in places],
                template,
                self.language.tokenizer,
                patches=self.visual_tokens,
                max_length=sys.maxsize,
            )
            for place, each in zip(places, made, strict=True):
                if len(each.ids) > self.max_length:
                    content = written[place].turns[-1].content[:60]
                    raise BadTextError(
                        f"language.max_length = {self.max_length} cuts the {len(each.ids)} tokens of a text "
                        f"that ends with {content!r}; raise it"
                    )
                tokens[place] = each
        return [each for each in tokens if each is not None]


def _divided(tokens: Tokens) -> tuple[Tokens, list[int]]:
    """What comes before the last answer, and that."""
    if not tokens.supervised:
        raise BadTextError("an answer of no tokens; remove it")
    end = max(place for place, label in enumerate(tokens.labels) if label != IGNORE_INDEX) + 1
    start = max((place for place in range(end) if tokens.labels[place] == IGNORE_INDEX), default=-1) + 1
    return Tokens(tokens.ids[:start], [IGNORE_INDEX] * start), tokens.ids[start:end]


def log_probs(model: VisionLanguage, candidates: Candidates, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token of every answer.

    Args:
        model: The frozen LLM.
        candidates: The answers.
        visual: Visual tokens of their pictures, `(pictures, tokens, d_llm)`.

    Returns:
        `(tokens,)` float32, and the answer of each `(tokens,)` int64, in their order.
    """
    ids, labels = _collated(model, candidates, visual.shape[1])
    losses, rows = model.losses(ids, labels, visual[candidates.owners.to(visual.device)])
    return -losses, rows


def hidden_states(model: VisionLanguage, candidates: Candidates, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states at every token of every answer: `(tokens, d_llm)` float32, and its answer."""
    ids, labels = _collated(model, candidates, visual.shape[1])
    embeds = model.language.embed(ids, visual[candidates.owners.to(visual.device)])
    rows, places = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    states = model.language.hidden(embeds, rows, places)
    return states, rows.to(states.device)


def _collated(model: VisionLanguage, candidates: Candidates, visual_tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and labels `(answers, length)` int64 of prompts with their answers, for a projector's tokens."""
    prompts = [_shown(prompt.ids, visual_tokens) for prompt in candidates.prompts]
    return model.language.collate(
        [
            Tokens([*prompt, *answer], [*[IGNORE_INDEX] * len(prompt), *answer])
            for prompt, answer in zip(prompts, candidates.answers, strict=True)
        ]
    )


def _shown(ids: list[int], visual_tokens: int) -> list[int]:
    """A prompt whose picture takes so many tokens."""
    first, number = ids.index(IMAGE_TOKEN_INDEX), ids.count(IMAGE_TOKEN_INDEX)
    return [*ids[:first], *[IMAGE_TOKEN_INDEX] * visual_tokens, *ids[first + number :]]
