"""Tiny random language models of every family, a tokenizer, and folders that hold them.

The weights are larger than those of a fresh model, so that attention is not flat, every
layer matters, and half of them cannot be removed without a trace.
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
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 288
POSITIONS = 32
WINDOW = 4  # of sliding attention: shorter than every sequence of the tests
WIDTH = 16
INNER = 24  # divisible by 4 and 8
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


FAMILIES: Mapping[str, Callable[[Mapping[str, Any], int], Any]] = MappingProxyType(
    {
        "opt": _opt,
        "llama": lambda common, inner: LlamaConfig(
            **common, intermediate_size=inner, num_key_value_heads=2
        ),
        "mistral": lambda common, inner: MistralConfig(
            **common, intermediate_size=inner, num_key_value_heads=2, sliding_window=WINDOW
        ),
        "qwen2": _qwen2,
        "qwen3": lambda common, inner: Qwen3Config(
            **common, intermediate_size=inner, num_key_value_heads=2, head_dim=4
        ),
        "gpt2": lambda common, inner: GPT2Config(  # no adapter serves it
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=POSITIONS,
            bos_token_id=0,
            eos_token_id=0,
        ),
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
) -> Any:
    """Random model in evaluation mode; the same for the same arguments."""
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
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](common, inner))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise, alpha=0.1)
    return model.to(dtype).eval()


def tiny_text(words: int = 3000, seed: int = 0) -> str:
    """Sentences of random short words, so that there is something to encode."""
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


def blocks_of(model: Any) -> Sequence[nn.Module]:
    """Decoder blocks, found without the adapter."""
    base = model.model
    return list(getattr(base, "decoder", base).layers)


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
