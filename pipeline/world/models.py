"""Tiny untrained models of the real architectures: CLIP vision, Llama, and their processors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcmp.pipeline.world.scenes import SIZE
from fedcmp.pipeline.world.texts import SHORT_ANSWER, WORD_PATTERN, vocabulary

if TYPE_CHECKING:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionModel,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer; words outside the world become `<unk>`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<s>", "</s>", IMAGE_TOKEN]
    words = {word: index for index, word in enumerate([*specials, *vocabulary()])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True)
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    inner.add_tokens([AddedToken(SHORT_ANSWER, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def llama(vocab_size: int, *, bos: int, eos: int, pad: int) -> LlamaForCausalLM:
    """Llama of width 128 and 3 layers, initialised so that attention starts by matching content.

    With `W_k = W_q` and `W_o = W_v^T` a position attends to positions of similar content and copies
    what it finds, which is the circuit that answering questions about a context needs.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = 128, 3
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=320,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
        model.lm_head.weight.copy_(0.15 * model.model.embed_tokens.weight)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight.normal_(0, width**-0.5)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
            mlp.down_proj.weight.normal_(0, (2 * layers * 320) ** -0.5)
    return model


def clip_vision() -> CLIPVisionModel:
    """CLIP vision tower of width 96 and 4 layers on 48x48 pixels, 36 patches of 8x8."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
            projection_dim=96,
            hidden_act="gelu",
            initializer_factor=1.0,
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's own preprocessing at the world's picture size."""
    from transformers import CLIPImageProcessorPil

    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
