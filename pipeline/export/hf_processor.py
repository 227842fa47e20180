"""The tokenizer and the processor beside a Hugging Face LLaVA."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json, write_json
from fedcmp.pipeline.models.loading import load_tokenizer
from fedcmp.pipeline.models.prompts import IMAGE_TOKEN_INDEX, V1_SYSTEM, question, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"


_QUESTION = "What is in the picture?"


# Content may be a list of pictures and texts, as processors want it, or plain text.
_FLATTEN = (
    "{%- set enable_thinking = false -%}"
    "{%- set flat = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is none -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set flat.text = '' -%}"
    "{%- for part in message['content'] -%}"
    "{%- set flat.text = flat.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def llava_tokenizer(language: Path) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, with a token for pictures."""
    from transformers import AddedToken

    tokenizer: PreTrainedTokenizerBase = load_tokenizer(language)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        token = AddedToken(IMAGE_TOKEN, normalized=False, special=True)
        tokenizer.add_tokens([token], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def write_processor(out: Path, encoder: Path, side: int, resize: str, options: dict[str, Any]) -> None:
    """`preprocessor_config.json` and `processor_config.json`."""
    images = _prepared(_image_processor(encoder), side, resize)
    write_json(out / "preprocessor_config.json", images | {"processor_class": "LlavaProcessor"})
    write_json(
        out / "processor_config.json",
        {"processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, **options},
    )


def _image_processor(encoder: Path) -> dict[str, Any]:
    """The encoder's own preparation of pictures, from where transformers looks for it first."""
    whole: dict[str, Any] = read_json(encoder / "processor_config.json") or {}
    images = whole.get("image_processor") or read_json(encoder / "preprocessor_config.json")
    if not images:
        raise UserError(f"--encoder {encoder}: no preprocessor_config.json; give the whole model")
    return dict(images)


def _prepared(images: dict[str, Any], side: int, resize: str) -> dict[str, Any]:
    """Preparation as stage one did it, under names of classes that version 4 knows too."""
    if resize != "crop":
        images |= {"size": {"height": side, "width": side}, "do_center_crop": False}
    if resize == "pad":
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    kind = images.get("image_processor_type")
    if kind:
        # Version 4 has no class for the backend; whoever loads the directory chooses it.
        images["image_processor_type"] = kind.removesuffix("Pil").removesuffix("Fast")
    return images


def write_tokenizer(out: Path, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Tokenizer and chat template, with names of classes and keys that version 4 knows too."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own["default"]
    tokenizer.chat_template = _FLATTEN + (V1_TEMPLATE if template == "v1" else str(own))
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config: dict[str, Any] = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    # Version 4's fast tokenizers give token types by default, which no decoder takes.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(path, config | {"processor_class": "LlavaProcessor"})


def compare_prompts(out: Path, language: Path, template: str, image: int) -> None:
    """Say so where the written tokenizer reads a question otherwise than training and evaluation did."""
    from transformers import AutoTokenizer

    with quiet():
        written: Any = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
        own = load_tokenizer(language)
    asked = tokenise(question(_QUESTION), template, own, patches=2, max_length=1_000_000)
    ours = [image if token == IMAGE_TOKEN_INDEX else token for token in asked.ids]
    content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    prompt = written.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    begun = bool(written.bos_token) and prompt.startswith(written.bos_token)
    theirs = written(prompt.replace(IMAGE_TOKEN, 2 * IMAGE_TOKEN), add_special_tokens=not begun)["input_ids"]
    if list(theirs) != ours:
        say(
            "Note: transformers' processor gives different token ids for a question than evaluation here, "
            f"{list(theirs)} instead of {ours}; answers may differ a little"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks on weights that a part does not need."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


V1_TEMPLATE = (
    "{{ bos_token }}" + V1_SYSTEM + "{{ ' ' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} ASSISTANT:"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
