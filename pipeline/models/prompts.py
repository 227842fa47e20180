"""How a record becomes token ids: LLaVA's `plain` and `v1` templates, or the tokenizer's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.records import IMAGE_PLACEHOLDER, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# Stands for an answer where a template is looked at; no template changes it.
_PROBE = "fedcmp"

_Spans = list[tuple[str, bool]]


class BadTextError(UserError):
    """A text that cannot be trained on or asked, though others can."""


@dataclass(frozen=True)
class Tokens:
    """Token ids with `IMAGE_TOKEN_INDEX` at every visual token, and labels as in transformers."""

    ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Number of predicted tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def tokenise(
    text: Text,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    patches: int,
    max_length: int,
) -> Tokens:
    """Render a text about one image and tokenise it.

    The last turn may be the user's, which gives a prompt to generate from; the first may be a system
    prompt, which stands in the place of the template's own. Each stretch of text
    between images is tokenised as a whole, so the ids are those of ordinary tokenisation.

    Args:
        text: The conversation.
        template: `plain`, `chat` or `v1`.
        tokenizer: A fast tokenizer.
        patches: Visual tokens an image.
        max_length: Tokens to keep at most; what is longer is cut at the end.

    Raises:
        BadTextError: `plain` is given several exchanges, not exactly one image is referred to, or
            `max_length` leaves no room for the image or for anything of the answer.
        UserError: The tokenizer has no such template.
    """
    return tokenise_all([text], template, tokenizer, patches=patches, max_length=max_length)[0]


def tokenise_all(
    texts: Sequence[Text],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    patches: int,
    max_length: int,
) -> list[Tokens]:
    """`tokenise` many texts with one call of the tokenizer, which is several times faster."""
    rendered = [_rendered(text, template, tokenizer) for text in texts]
    stretches = [part for spans, _ in rendered for part in _joined(spans).split(IMAGE_PLACEHOLDER)]
    if not stretches:
        return []
    encoded = tokenizer(stretches, add_special_tokens=False, return_offsets_mapping=True)
    parts = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return [
        _spliced(spans, start if begin else [], (next(parts), next(parts)), patches, max_length)
        for spans, begin in rendered
    ]


def problems(
    texts: Sequence[Text],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    patches: int,
    max_length: int,
) -> list[str | None]:
    """Why `tokenise` would refuse each of many texts, or None; several times faster than to try.

    Raises:
        UserError: The tokenizer has no such template.
    """
    found: list[str | None] = [None] * len(texts)
    stretches, owners = [], []
    for number, text in enumerate(texts):
        try:
            spans, _ = _rendered(text, template, tokenizer)
        except BadTextError as error:
            found[number] = str(error)
            continue
        stretches += _joined(spans).split(IMAGE_PLACEHOLDER)
        owners.append(number)
    if not stretches:
        return found
    encoded = tokenizer(stretches, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for place, number in enumerate(owners):
        length = len(encoded[2 * place]) + len(encoded[2 * place + 1]) + patches + 1
        if length > max_length:
            # Something is cut: only then does it matter what.
            try:
                tokenise(texts[number], template, tokenizer, patches=patches, max_length=max_length)
            except BadTextError as error:
                found[number] = str(error)
    return found


def _rendered(text: Text, template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[_Spans, bool]:
    spans, begin = _RENDER[template](text.turns, tokenizer)
    content = _joined(spans)
    if content.count(IMAGE_PLACEHOLDER) != 1:
        raise BadTextError(
            f"text {content[:60]!r} refers to {content.count(IMAGE_PLACEHOLDER)} images, not one; "
            f"remove the superfluous '{IMAGE_PLACEHOLDER}'"
        )
    return spans, begin


def _joined(spans: _Spans) -> str:
    return "".join(content for content, _ in spans)


def _spliced(
    spans: _Spans, start: list[int], parts: Sequence[tuple[Any, Any]], patches: int, max_length: int
) -> Tokens:
    """Ids and labels from the two stretches around the image; a token is supervised if its end is."""
    content = _joined(spans)
    answered = [answer for content, answer in spans for _ in content]
    (before, before_ends), (after, after_ends) = parts
    offset = content.index(IMAGE_PLACEHOLDER) + len(IMAGE_PLACEHOLDER)
    ids = [*start, *before, *[IMAGE_TOKEN_INDEX] * patches, *after]
    supervised = [False] * len(start)
    supervised += [answered[max(stop - 1, 0)] for _, stop in before_ends]
    supervised += [False] * patches
    supervised += [answered[offset + max(stop - 1, 0)] for _, stop in after_ends]
    labels = [token if wanted else IGNORE_INDEX for token, wanted in zip(ids, supervised, strict=True)]
    kept = Tokens(ids[:max_length], labels[:max_length])
    lost_answer = not kept.supervised and any(supervised)
    if kept.ids.count(IMAGE_TOKEN_INDEX) < patches or lost_answer:
        raise BadTextError(
            f"language.max_length = {max_length} leaves no room for the image's {patches} tokens and an "
            f"answer in text {content[:60]!r}; raise it"
        )
    return kept


def question(content: str) -> Text:
    """A prompt to be answered."""
    return Text((Turn("user", f"{IMAGE_PLACEHOLDER}\n{content}"),))


def stop_string(template: str) -> str | None:
    """What ends an answer besides the tokenizer's end-of-sequence token."""
    return "\n" if template == "plain" else None


def require_system_prompt(template: str, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """See whether a template has a place for a system prompt.

    Raises:
        UserError: It has none, naming it.
    """
    remedy = "use 'v1', or put it into the question"
    asked = question(_PROBE).turns
    try:
        content = _joined(_RENDER[template]((Turn("system", prompt), *asked), tokenizer)[0])
    except BadTextError as error:
        raise UserError(f"system_prompt: {error}; {remedy}") from None
    # Templates trim it.
    if prompt.strip() not in content:
        raise UserError(f"system_prompt: {tokenizer.name_or_path}: its chat template leaves it out; {remedy}")
    if template == "chat":
        messages = [{"role": turn.role, "content": turn.content} for turn in asked]
        for role in ("user", "assistant"):
            with suppress(BadTextError):
                if content == _begun([{"role": role, "content": prompt}, *messages], tokenizer):
                    raise UserError(
                        f"system_prompt: {tokenizer.name_or_path}: its chat template writes it as the "
                        f"{role}'s; {remedy}"
                    )


def _plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[_Spans, bool]:
    if turns[0].role == "system":
        raise BadTextError("template 'plain' has no place for a system prompt")
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    if len(answers) > 1:
        raise BadTextError(
            f"a text with {len(answers)} answers, the first {answers[0][:40]!r}, has no 'plain' "
            "form; set language.template to 'chat' or 'v1'"
        )
    return [(IMAGE_PLACEHOLDER, False), *((answer + "\n", True) for answer in answers)], True


def _with_user(turns: Sequence[Turn]) -> list[Turn]:
    """Give a bare caption its prompt, and the first user turn its image."""
    full = list(turns)
    first = int(full[0].role == "system")
    if full[first].role == "assistant":
        full.insert(first, Turn("user", CAPTION_PROMPT))
    if not any(IMAGE_PLACEHOLDER in turn.content for turn in full):
        full[first] = Turn("user", f"{IMAGE_PLACEHOLDER}\n{full[first].content}")
    return full


def _chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[_Spans, bool]:
    messages = [{"role": turn.role, "content": turn.content} for turn in _with_user(turns)]
    spans: _Spans = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] == "system":
            continue  # many a template writes none without the user's turn
        answer = message["role"] == "assistant"
        upto = _begun(messages[: index + 1], tokenizer)
        if not upto.startswith(done):
            raise BadTextError(
                f"{tokenizer.name_or_path}: its chat template rewrites earlier turns, so answers "
                "cannot be told from prompts; use 'v1'"
            )
        spans.append((upto[len(done) :], answer))
        done = upto
    return spans, False


def _begun(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation up to its end; after the user's turn with all that comes before the answer's words."""
    if messages[-1]["role"] == "assistant":
        return _written(messages, tokenizer)
    begun = _written(messages, tokenizer, reply=True)
    ended = _written(messages, tokenizer)
    if begun != ended:
        return begun
    # This template begins no reply: what it writes before an answer's words is not for the model to learn.
    answered = _written([*messages, {"role": "assistant", "content": _PROBE}], tokenizer)
    if not answered.startswith(ended) or _PROBE not in answered:
        raise UserError(f"{tokenizer.name_or_path}: its chat template does not write answers; use 'v1'")
    header = answered[len(ended) : answered.index(_PROBE)]
    # A space before the answer belongs to its first word.
    return ended + (header.rstrip(" ") if header.strip() else "")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token with which the chat template ends an answer, where it has one.

    Many a fine-tuned model's generation_config does not name it; its answers would run on into a turn of
    the user's.
    """
    if tokenizer.chat_template is None:
        return set()
    turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    try:
        after = _written(turns, tokenizer).rpartition(_PROBE)[2].lstrip()
    except UserError:
        return set()
    special = tokenizer.added_tokens_decoder.items()
    return {number for number, token in special if token.special and after.startswith(token.content)}


def _written(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, reply: bool = False
) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: this tokenizer has no chat template; use 'v1'")
    try:
        # Answers are not thought about first, where a template would (Qwen3); others do not look at it.
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=reply, enable_thinking=False
            )
        )
    except TemplateError as error:
        raise BadTextError(
            f"text {messages[0]['content'][:60]!r}: the chat template refuses it: {one_line(error)}"
        ) from None


def _v1(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[_Spans, bool]:
    system = turns[0].content if turns[0].role == "system" else V1_SYSTEM
    spans: _Spans = [(system + " ", False)]
    for turn in _with_user(turns):
        if turn.role == "system":
            continue
        if turn.role == "user":
            spans.append((f"USER: {turn.content} ASSISTANT:", False))
        else:
            spans.append((f" {turn.content}{tokenizer.eos_token or ''}", True))
    return spans, True


_RENDER = {"plain": _plain, "chat": _chat, "v1": _v1}
