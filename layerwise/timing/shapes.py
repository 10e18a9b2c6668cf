"""Random models of known shapes, for timing: nothing is downloaded or trained.

The column norms of a matrix follow a power law, in a random order. So its singular values
decay, and so do the eigenvalues of the grams of later layers. Only the blocks have the
shape of the named model: the vocabulary is small, since embeddings are not pruned.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from layerwise.demo import MODELS, model_path

VOCABULARY = 1024
DECAY = 0.5  # exponent of the power law of the columns
PIECE_BYTES = 2 << 30  # largest size of the blocks in memory at a time


def _opt(hidden: int, layers: int, heads: int) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=2048,
    )


def _mamba(hidden: int, layers: int) -> Any:
    from transformers import MambaConfig

    return MambaConfig(vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers)


def _demo(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path(name), local_files_only=True)


SHAPES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "opt-125m": lambda: _opt(768, 12, 12),
        "opt-1.3b": lambda: _opt(2048, 24, 32),
        "llama-7b": lambda: _llama(4096, 11008, 32, 32, 32),
        "llama-3-8b": lambda: _llama(4096, 14336, 32, 32, 8),
        "mamba-130m": lambda: _mamba(768, 24),
        **{f"demo-{name}": partial(_demo, name) for name in MODELS},
    }
)
"""Configuration of every shape by name; building one loads transformers."""


def random_model(config: Any, blocks: int, dtype: torch.dtype, seed: int) -> Any:
    """Model of a configuration with some of its blocks, in evaluation mode.

    Parameters
    ----------
    config
        Configuration of any causal language model.
    blocks
        Number of blocks.
    dtype
        Type of the weights.
    seed
        Seed of a local generator.
    """
    from transformers import AutoModelForCausalLM

    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": blocks})
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                width = parameter.shape[1]
                sizes = torch.arange(1, width + 1).float() ** -DECAY
                sizes = sizes[torch.randperm(width, generator=generator)]
                parameter.normal_(generator=generator)
                parameter.mul_((sizes / sizes.norm()).to(dtype))
    return model.eval()


def piece_size(config: Any, dtype: torch.dtype) -> int:
    """Number of blocks in memory at a time: at least one, at most all."""
    from transformers import AutoModelForCausalLM

    def size(blocks: int) -> int:
        few = type(config).from_dict({**config.to_dict(), "num_hidden_layers": blocks})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(few, dtype=dtype)
        return sum(parameter.nbytes for parameter in model.parameters())

    block = size(2) - size(1)
    return max(1, min(int(config.num_hidden_layers), PIECE_BYTES // block))
