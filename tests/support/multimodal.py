"""Tiny multimodal models, stored under the names that the hub has for their types."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma4Config,
    Llama4Config,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    Qwen2VLConfig,
)

from tests.support.models import POSITIONS, VOCABULARY, save_checkpoint

IMAGE = VOCABULARY - 1  # token id that stands for an image
VISION_WIDTH = 8
TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
)
VISION: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 12,
        "num_hidden_layers": 3,  # more than the text part has
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
)


def _llava() -> Any:
    return LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
    )


def _gemma3() -> Any:
    return Gemma3Config(
        text_config={**TEXT, "head_dim": 4, "sliding_window": 4},
        vision_config=dict(VISION),
        mm_tokens_per_image=1,
        image_token_index=IMAGE,
        boi_token_index=IMAGE - 1,
        eoi_token_index=IMAGE - 2,
    )


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    vision = {
        "depth": 3,
        "embed_dim": 8,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": 4,
    }
    return Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "mlp_ratio": 2},
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
    )


def _gemma4(shared: int) -> Any:
    """Larger heads in every second block; infinite limits of activations are stored."""
    vision = {
        **VISION,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "patch_size": 4,
        "use_clipped_linears": True,
    }
    return Gemma4Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 4,
            "global_head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 4,
            "num_kv_shared_layers": shared,
        },
        vision_config=vision,
        audio_config=None,
    )


def _mllama() -> Any:
    """Its second block looks at images, and does not run without one."""
    return MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1]},
        vision_config={
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_output_dim": 16,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )


def _llama4() -> Any:
    """A mixture of experts in every second block."""
    return Llama4Config(
        text_config={
            **TEXT,
            "intermediate_size_mlp": 24,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "head_dim": 4,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        },
        vision_config={
            **VISION,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "vision_output_dim": 8,
            "projector_input_dim": 8,
            "projector_output_dim": 8,
            "pixel_shuffle_ratio": 0.5,
        },
    )


CONFIGS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "llava": _llava,
        "gemma3": _gemma3,
        "qwen2_vl": _qwen2_vl,
        "gemma4": lambda: _gemma4(0),
        "gemma4 with shared keys": lambda: _gemma4(2),
        "mllama": _mllama,
        "llama4": _llama4,
    }
)


def save_multimodal(folder: Path, kind: str, *, dtype: Any = torch.bfloat16) -> Path:
    """Write a random model as its own class stores it, with a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(CONFIGS[kind](), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return save_checkpoint(folder, model.eval())
