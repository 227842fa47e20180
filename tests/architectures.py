"""Tiny random LMs of many architectures, with logits of a trained model's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH = 32
# By whatever name a configuration has them; what it does not have is left out.
_SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "embedding_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
# Peculiarities that are worth a row, and keys without which a tiny model cannot be built.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "apertus": {},
    "arcee": {},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "bert": {},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"rotary_dim": 4, "n_layer": 2, "n_head": 4, "n_embd": WIDTH},
    "cohere": {},
    "cohere2": {},
    "ctrl": {"n_layer": 2, "n_head": 4, "n_embd": WIDTH, "dff": 48},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "diffllama": {},
    "electra": {"embedding_size": 16},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "falcon, alibi": {"alibi": True},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "lm_head_multiplier": 0.125,
        "embedding_multiplier": 4.0,
    },
    "falcon_mamba": {"state_size": 8},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": None,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "glm": {"pad_token_id": 0},
    "glm4": {"pad_token_id": 0},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": WIDTH},
    "gpt_bigcode": {"n_layer": 2, "n_head": 4, "n_embd": WIDTH},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 4, "n_layer": 2, "n_head": 4, "n_embd": WIDTH},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 4.0, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 8.0},
    "granitemoehybrid": {
        "logits_scaling": 8.0,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "helium": {},
    "hyperclovax": {"logits_scaling": 8.0},
    "jamba": {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "minimax": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "mpt": {"d_model": WIDTH, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "nanochat": {},
    "nemotron": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "openai-gpt": {"n_layer": 2, "n_head": 4, "n_embd": WIDTH},
    "opt": {"ffn_dim": 48},
    "opt, project_in": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2, window": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {
        "lru_width": WIDTH,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 64,
    },
    "roberta": {},
    "rwkv": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": {},
    "t5": {},
    "xglm": {"d_model": WIDTH, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "xlnet": {"n_layer": 2, "n_head": 4, "d_model": WIDTH, "d_inner": 48, "d_head": 8},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "hybrid_layer_ids": [1],
    },
}


def save(name: str, folder: Path, tokenizer: Any, *, seed: int = 0) -> Path:
    """A model with its tokenizer.

    Args:
        name: Key of `ARCHITECTURES`: a model type, perhaps with a comma and what is peculiar about it.
        folder: Where to.
        tokenizer: A fast tokenizer.
        seed: Of the weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, special = CONFIG_MAPPING[name.split(",")[0]], ARCHITECTURES[name]
    known = kind()
    small = {key: value for key, value in _SMALL.items() if key in known.to_dict()}
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    special = {key: len(tokenizer) if value is None else value for key, value in special.items()}
    config = kind(**{**small, **words, **special})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "t5":
            from transformers import T5ForConditionalGeneration as Whole

            model: Any = Whole(config)
        else:
            model = AutoModelForCausalLM.from_config(config).eval().float()
        with torch.no_grad():
            for each in model.parameters():
                if each.dim() > 1:
                    each.mul_(4)
                if not each.any():
                    each.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
