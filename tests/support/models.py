"""Tiny random language models of every family, a tokenizer, and folders that hold them.

The weights are larger than those of a fresh model, so that attention is not flat, every
layer matters, and removing half of them has a clear effect.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 288
POSITIONS = 32
WINDOW = 4  # of sliding attention: shorter than every sequence of the tests
WIDTH = 16
INNER = 24  # divisible by 4 and 8
RANK = 4  # of the time steps of Mamba
STATES = 4  # of a channel of Mamba
SHARD = "model.safetensors"


def _opt(common: Mapping[str, Any], inner: int) -> Any:
    return OPTConfig(**common, ffn_dim=inner, word_embed_proj_dim=WIDTH, dropout=0.5)


def _qwen2(common: Mapping[str, Any], inner: int) -> Any:
    """The first block sees everything, the others a window: masks differ by block."""
    return Qwen2Config(
        **common,
        intermediate_size=inner,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    )


def _grouped(config: Any, **more: Any) -> Callable[[Mapping[str, Any], int], Any]:
    """Two heads of keys and values for four of queries."""
    return lambda common, inner: config(
        **common, intermediate_size=inner, num_key_value_heads=2, **more
    )


def _gpt2(common: Mapping[str, Any], inner: int) -> Any:
    """Weights of linear layers are stored as (in, out)."""
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    own = {names.get(name, name): value for name, value in common.items()}
    return GPT2Config(**own, n_inner=inner)


def _mamba(config: Any, **more: Any) -> Callable[[Mapping[str, Any], int], Any]:
    """State space models have no heads and no positions."""
    absent = {"num_attention_heads", "max_position_embeddings"}
    return lambda common, inner: config(
        **{name: value for name, value in common.items() if name not in absent},
        state_size=STATES,
        **more,
    )


FAMILIES: Mapping[str, Callable[[Mapping[str, Any], int], Any]] = MappingProxyType(
    {
        "opt": _opt,
        "llama": _grouped(LlamaConfig),
        "mistral": _grouped(MistralConfig, sliding_window=WINDOW),
        "qwen2": _qwen2,
        "qwen3": _grouped(Qwen3Config, head_dim=4),
        "mamba": _mamba(MambaConfig, time_step_rank=RANK),
        "falcon_mamba": _mamba(FalconMambaConfig, time_step_rank=RANK),
        "mamba2": _mamba(Mamba2Config, num_heads=4, head_dim=8, n_groups=2, chunk_size=8),
        # these have no declared adapter
        "gpt2": _gpt2,
        "gpt_neox": lambda common, inner: GPTNeoXConfig(**common, intermediate_size=inner),
        "gemma": _grouped(GemmaConfig, head_dim=4),
        "gemma2": _grouped(Gemma2Config, head_dim=4, sliding_window=WINDOW),
        "gemma3_text": _grouped(Gemma3TextConfig, head_dim=4, sliding_window=WINDOW),
        "phi": _grouped(PhiConfig),
    }
)
"""Configuration of every family by ``model_type``."""


def tiny_model(
    family: str,
    *,
    layers: int = 2,
    inner: int = INNER,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    seed: int = 0,
    **more: Any,
) -> Any:
    """Random model in evaluation mode; the same for the same arguments.

    Further arguments are fields of the configuration.
    """
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    generator = torch.Generator().manual_seed(seed)
    config = FAMILIES[family](common, inner)
    for name, value in more.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise, alpha=0.1)
    return model.to(dtype).eval()


def mixture_of_experts() -> Any:
    """Qwen3 with experts in fused parameters, which cannot be pruned yet."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


class Block(nn.Module):
    """A residual block of two linear layers; subclasses break one assumption each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        states: Tensor = hidden + self.second(torch.tanh(self.first(hidden)))
        return states


class Decoder(nn.Module):
    """The minimal language model that a run accepts."""

    def __init__(self, kind: type[nn.Module] = Block, count: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(count))
        self.config = type("Config", (), {"model_type": "own"})()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def tiny_text(words: int = 3000, seed: int = 0) -> str:
    """Sentences of random short words to encode."""
    draw = random.Random(seed)
    vocabulary = [
        "".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(90)
    ]
    return " ".join(
        draw.choice(vocabulary) + ("." if i % 9 == 8 else "") for i in range(words)
    )


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the tiny text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def save_checkpoint(
    folder: Path, model: Any, *, tokenizer: bool = True, max_shard_size: str = "1GB"
) -> Path:
    """Write a model folder with ``save_pretrained``."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def random_tokens(sequences: int, length: int, seed: int = 0) -> Tensor:
    """Token ids, shape (sequences, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (sequences, length), generator=generator)


BLOCKS = (
    "model.decoder.layers",
    "model.layers",
    "backbone.layers",
    "transformer.h",
    "gpt_neox.layers",
)


def blocks_name(model: nn.Module) -> str:
    """Full name of the list of decoder blocks, found without the adapter."""
    names = dict(model.named_modules())
    return next(name for name in BLOCKS if name in names)


def blocks_of(model: nn.Module) -> list[Any]:
    """Decoder blocks, found without the adapter."""
    blocks = model.get_submodule(blocks_name(model))
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def weight_of(model: nn.Module, linear: str) -> Tensor:
    """Weight of a linear by the name of the module."""
    return model.get_parameter(f"{linear}.weight").detach()


def _keep_input(calls: list[Any], module: nn.Module, args: tuple[Any, ...]) -> None:
    calls.append(args[0])


@contextmanager
def recorded_inputs(
    module: nn.Module, names: Sequence[str]
) -> Iterator[dict[str, list[Any]]]:
    """Inputs of some submodules, call by call, while the context lasts."""
    seen: dict[str, list[Any]] = {name: [] for name in names}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            partial(_keep_input, seen[name])
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def edit_shard(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file by hand."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every safetensors file of a folder, the masks included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, or that only one side has."""
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
