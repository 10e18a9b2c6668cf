"""Cost of running a model: size, memory, latency of a prompt, tokens per second.

Models are compared within one process. After a warm-up they take turns, so that a change
of clock or load affects all of them alike. Ratios are medians over the turns.

Memory is the size of a model plus the peak growth in a forward pass. On a GPU, PyTorch's
allocator counts it. On Linux the kernel counts it for one pass, after two steps: unused
heap is returned first, because growth could reuse it, and the peak of the resident size is
reset. On other systems memory is not shown.
"""

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModelError, UsageError
from layerwise.modes import in_ordinary_mode
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.data.context import context_length
from layerwise.run.models.architecture import embedding_rows
from layerwise.run.models.loading import quiet_transformers

BATCHES = (1, 16)
LENGTH = 128  # tokens of a prompt
NEW_TOKENS = 32
REPEATS = 7
RESET_PEAK = "5"  # written to /proc/self/clear_refs, it resets the peak to the current size


@dataclass(frozen=True)
class Timing:
    """Seconds of a workload, turn by turn.

    Parameters
    ----------
    tokens
        Tokens computed in one turn.
    seconds
        Seconds of every turn.
    """

    tokens: int
    seconds: tuple[float, ...]

    @property
    def latency(self) -> float:
        """Median seconds of a turn."""
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a turn divided by the median seconds."""
        return self.tokens / self.latency

    def speedup(self, other: "Timing") -> float:
        """How many times faster `other` is: median ratio over the turns."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return median(mine / theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Speed:
    """Figures of one model.

    Parameters
    ----------
    parameters
        Number of parameters; shared ones count once.
    bytes
        Bytes of parameters and buffers; shared ones count once.
    peak_memory
        Bytes of the model plus the peak growth in the largest prefill; None if unknown.
    prefill
        One forward pass over prompts, by batch size.
    length
        Tokens of each prompt.
    decode
        Generation from one token with a cache, batch 1.
    """

    parameters: int
    bytes: int
    peak_memory: int | None
    prefill: dict[int, Timing]
    length: int
    decode: Timing


@in_ordinary_mode
@torch.no_grad()
def measure_speed(
    models: Sequence[Any],
    *,
    batches: Sequence[int] = BATCHES,
    length: int = LENGTH,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> tuple[Speed, ...]:
    """Measure causal language models side by side.

    Parameters
    ----------
    models
        Models, each on its device; run in evaluation mode, restored afterwards.
    batches
        Numbers of prompts of a prefill.
    length
        Tokens of a prompt; fewer if a model has fewer positions.
    new_tokens
        Number of generated tokens; decoding is greedy and ignores end tokens.
    repeats
        Turns of every model, after one warm-up turn.
    seed
        Seed of the random token ids, which are the same for all models.

    Returns
    -------
    tuple of Speed
        Figures in the order of the models.
    """
    for name, value in (
        ("batches", min(batches, default=0)),
        ("length", length),
        ("new_tokens", new_tokens),
        ("repeats", repeats),
    ):
        if value < 1:
            message = f"{name} must be at least 1, got {value}"
            raise UsageError(message)
    longest = min(context_length(model.config) or math.inf for model in models)
    if longest < 2:
        message = f"the model has {longest} positions: decoding needs 2, leave out --speed"
        raise UsageError(message)
    length = int(min(length, longest))
    new_tokens = int(min(new_tokens, longest - 1))
    generator = torch.Generator().manual_seed(seed)
    rows = min(embedding_rows(model) for model in models)
    ids = torch.randint(rows, (max(batches), length), generator=generator)
    with ExitStack() as modes, quiet_transformers():
        for model in models:
            modes.enter_context(evaluation_mode(model))
        prefill = {
            batch: _turns(models, partial(_prefill, ids[:batch]), repeats)
            for batch in batches
        }
        decode = _turns(models, partial(_decode, ids[:1, :1], new_tokens), repeats)
        growth = [_growth(model, partial(_prefill, ids)) for model in models]
    speeds = []
    for index, model in enumerate(models):
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        more = growth[index]
        timings = {b: Timing(b * length, turns[index]) for b, turns in prefill.items()}
        speeds.append(
            Speed(
                parameters=sum(p.numel() for p in model.parameters()),
                bytes=size,
                peak_memory=None if more is None else size + more,
                prefill=timings,
                length=length,
                decode=Timing(new_tokens, decode[index]),
            )
        )
    return tuple(speeds)


def _prefill(ids: Tensor, model: Any) -> None:
    model(input_ids=ids.to(_device(model)), use_cache=True)


def _decode(ids: Tensor, new_tokens: int, model: Any) -> None:
    ids = ids.to(_device(model))
    with _plain_generation(model, new_tokens):
        generated = model.generate(ids, attention_mask=torch.ones_like(ids))
    if generated.shape[1] != 1 + new_tokens:
        message = (
            f"{type(model).__name__}.generate() gave {generated.shape[1] - 1} tokens, not "
            f"{new_tokens}: leave out --speed"
        )
        raise UnsupportedModelError(message)


@contextmanager
def _plain_generation(model: Any, new_tokens: int) -> Iterator[None]:
    """Let a model generate greedily so many tokens, whatever its own settings say."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # the end token is ignored
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    try:
        yield
    finally:
        model.generation_config = own


def _turns(
    models: Sequence[Any], work: Callable[[Any], None], repeats: int
) -> list[tuple[float, ...]]:
    """Seconds of every turn, per model; the first turn is a warm-up."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, times in zip(models, seconds, strict=True):
            _wait(model)
            start = time.perf_counter()
            work(model)
            _wait(model)
            if turn:
                times.append(time.perf_counter() - start)
    return [tuple(times) for times in seconds]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _wait(model: nn.Module) -> None:
    if _device(model).type == "cuda":
        torch.cuda.synchronize(_device(model))


def _growth(model: nn.Module, work: Callable[[Any], None]) -> int | None:
    """Peak bytes that `work` needs in addition to those in use before."""
    device = _device(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work(model)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        before = _resident("VmRSS")
        work(model)
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError, LookupError, ValueError):  # not Linux, or forbidden
        return None


def _resident(figure: str) -> int:
    """Resident bytes of this process according to the kernel: current or peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next((line for line in lines if line.startswith(figure)), "")
    return int(line.split()[1]) * 1024
