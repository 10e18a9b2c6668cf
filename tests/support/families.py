"""A small configuration for every causal language model type of transformers.

One rule sets the fields that most configurations share; what a family needs besides is in
``SPECIAL``.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from tests.support.models import VOCABULARY

FAMILIES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

WIDTH, INNER, LAYERS, HEADS, HEAD, RANK, POSITIONS = 32, 48, 4, 4, 8, 4, 64
SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input audio_vocab_size"),
    (
        WIDTH,
        "hidden_size d_model hidden_size_global router_hidden_size n_embd embedding_size "
        "embed_dim emb_dim attention_hidden_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim dim_model_base",
    ),
    (
        INNER,
        "intermediate_size ffn_dim ffn_hidden_size d_ff dff dim_ff d_inner "
        "decoder_ffn_dim encoder_ffn_dim shared_intermediate_size intermediate_size_mlp "
        "dense_intermediate_size feed_forward_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers "
        "encoder_layers num_encoder_layers num_blocks depth",
    ),
    (
        HEADS,
        "num_attention_heads n_head num_heads n_heads decoder_attention_heads "
        "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts attention_heads "
        "swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads "
        "rotary_dim ffn_round_up_to_multiple_of",
    ),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k num_kv_heads "
        "linear_num_key_heads",
    ),
    (RANK, "mamba_d_state state_size mamba_dt_rank time_step_rank ssm_state_size"),
    (1, "n_group n_groups topk_group num_expert_group mamba_n_groups mamba_ngroups"),
    (
        HEAD,
        "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim dim_head "
        "global_head_dim kv_channels",
    ),
    (
        16,
        "kv_lora_rank q_lora_rank moe_intermediate_size chunk_size "
        "expert_ffn_hidden_size hidden_size_per_layer_input o_lora_rank conv_hidden_size "
        "index_topk mamba_chunk_size",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len model_max_length "
        "max_target_positions max_source_positions",
    ),
)
GROUPED = "num_key_value_heads", "num_attention_heads"
LAYER_TYPES = ["sliding_attention", "full_attention"]
MAMBA_HEADS = {"mamba_n_heads": 4}
NO_SHARING = {"num_kv_shared_layers": 0}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ASSISTANT = {
    "backbone_hidden_size": WIDTH,
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": LAYERS,
    },
}
INKLING = {
    "sliding_window_size": 16,
    "swa_num_key_value_heads": 2,
    "rel_extent": 32,
    "d_rel": 8,
    "local_layer_ids": [0, 2],
}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
}
DOTS3 = {
    "text_config": {
        "head_dim": 2 * HEAD,
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 2),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 16),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), HEAD),
        "swa_head_dim": 2 * HEAD,
    },
    "vision_config": {
        "num_hidden_layers": 42,
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
    },
    "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
}
SPECIAL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "bamba": MAMBA_HEADS | {"attn_layer_indices": [1]},
        "cohere_compass_text": {
            "layer_types": LAYER_TYPES * 2,
            "rope_parameters": {kind: dict(ROPE) for kind in LAYER_TYPES},
        },
        "deepseek_v2": {"num_experts_per_tok": 2},
        "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
        "blt": {"encoder_hash_byte_group_vocab": 64},
        "dbrx": {
            "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": INNER},
        },
        "dots3_note": DOTS3,
        "dots3_note_text": DOTS3["text_config"],
        "emu3": {
            "vocabulary_map": {
                "<image>": 5,
                "<|extra_200|>": 6,
                "<|visual token 000000|>": 7,
            },
            "vq_config": {
                "base_channels": 32,
                "codebook_size": 8,
                "channel_multiplier": [1],
            },
        },
        "falcon_h1": MAMBA_HEADS | {"mamba_d_ssm": 2 * WIDTH},
        "falcon_mamba": {"time_step_rank": RANK},
        "gemma3n": {"text_config": NO_SHARING},
        "gemma3n_text": NO_SHARING | {"laurel_rank": 8},
        "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
        "granitemoehybrid": MAMBA_HEADS | {"layer_types": ["mamba", "attention"] * 2},
        "hunyuan_v1_dense": {"head_dim": HEAD},
        "hunyuan_v1_moe": {"head_dim": HEAD, "moe_topk": 2, "num_experts": 4},
        "gemma4_assistant": ASSISTANT,
        "gemma4_unified_assistant": ASSISTANT,
        "inkling2_text": INKLING,
        "inkling_text": INKLING,
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
        "longcat_flash": {"zero_expert_num": 2},
        "jamba": {"mamba_dt_rank": RANK},
        "mamba": {"time_step_rank": RANK},
        "mamba2": {"num_heads": 8},
        "ministral": {"head_dim": HEAD},
        "nemotron": {"num_key_value_heads": 2},
        "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": HEAD},
        "plbart": {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS},
        "qwen4_exp": {"text_config": QWEN4},
        "qwen4_exp_text": QWEN4,
        "reformer": {
            "attn_layers": ["local", "lsh"] * 2,
            "axial_pos_shape": (8, 8),
            "axial_pos_embds_dim": (16, 16),
            "attention_head_size": HEAD,
        },
        "xmod": {"default_language": "en_XX"},
        "zamba": {
            "mamba_dt_rank": 4,
            "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"],
        },
        "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
        "zaya": {"num_experts_per_tok": 1},
    }
)
"""Fields that a family needs besides, by its type."""
FLOAT32 = ("reformer", "xlnet", "xlstm")
"""Families with kernels for float32 alone."""


def tiny_config(family: str) -> Any:
    """Configuration of a model of a few thousand parameters."""
    return CONFIG_MAPPING[family](**fields_of(family))


def fields_of(family: str) -> dict[str, Any]:
    """Fields of the configuration that are not the defaults."""
    return merged(small(CONFIG_MAPPING[family]), SPECIAL.get(family, {}))


def small(kind: Any) -> dict[str, Any]:
    """Small values for the fields of a class of configurations and of its parts."""
    parts = {name: small(part) for name, part in _parts(kind).items()}
    own: dict[str, Any] = {field.name: field.default for field in fields(kind)}
    sizes = {
        name: size
        for size, names in SIZES
        for name in names.split()
        if isinstance(own.get(name), int) and own[name] > 0
    }
    keys, queries = (own.get(name) for name in GROUPED)
    if isinstance(keys, int):
        sizes[GROUPED[0]] = HEADS if keys == queries else 2
    tokens = {
        name: 0
        for name, value in own.items()
        if name.endswith(("token_id", "token_index"))
        and isinstance(value, int)
        and value >= VOCABULARY
    }
    decoder = {"is_decoder": True} if "is_decoder" in own else {}
    return sizes | tokens | decoder | parts


def _parts(kind: Any) -> dict[str, Any]:
    """Class of every nested configuration, by field."""
    return {
        name: CONFIG_MAPPING[spec.model_type]
        if spec.config_class is AutoConfig
        else spec.config_class
        for name, spec in getattr(kind, "sub_configs_defaults", {}).items()
    }


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of both, nested ones too; those of `other` win."""
    both = {**one, **other}
    for name in one.keys() & other.keys():
        if isinstance(one[name], dict) and isinstance(other[name], dict):
            both[name] = merged(one[name], other[name])
    return both
