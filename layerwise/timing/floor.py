"""The least time that stages of a run could take on this machine: counted work over rates.

Counted is what no implementation can avoid: the products of the forward passes, half of
each symmetric gram, one product per matrix to grade its answer, and the bytes that are
read and written. The rates are measured in the same process: the fastest matrix product
of each type, and a copy in memory. A stage that waits for neither is bounded by nothing
that is counted here.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerwise.adapters import Adapter
from layerwise.adapters.linear import is_linear, matrix
from layerwise.gram import precision_of

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
TRIES = 5
LEAST_SECONDS = 1.0  # of the tries together, so that a busy machine is met in a good moment


@dataclass(frozen=True)
class Work:
    """Operations by type of number, and bytes that are read or written."""

    flops: Mapping[torch.dtype, float] = field(default_factory=dict)
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        flops = dict(self.flops)
        for dtype, count in other.flops.items():
            flops[dtype] = flops.get(dtype, 0.0) + count
        return Work(flops, self.bytes + other.bytes)

    @property
    def total_flops(self) -> float:
        """Operations of all types."""
        return sum(self.flops.values())


class Machine:
    """Rates of a device, measured when they are first asked for.

    Parameters
    ----------
    device
        Where the run computes.
    gemm_size
        Order of the square matrices; by default large ones for the device.
    copy_bytes
        Bytes that are copied; by default many for the device.
    least_seconds
        Of the tries of one rate together; a second by default.
    """

    def __init__(
        self,
        device: torch.device,
        gemm_size: int | None = None,
        copy_bytes: int | None = None,
        least_seconds: float | None = None,
    ) -> None:
        self.device = device
        self._least_seconds = LEAST_SECONDS if least_seconds is None else least_seconds
        self._gemm_size = gemm_size or GEMM_SIZE.get(device.type, 1024)
        self._copy_bytes = copy_bytes or COPY_BYTES.get(device.type, 1 << 28)
        self.gemm_rates: dict[torch.dtype, float] = {}
        self._copy_rate = 0.0

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """Operations per second of the fastest of a few square products."""
        if dtype not in self.gemm_rates:
            n = self._gemm_size
            # not of ones: a GPU is faster where few bits change
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            self.gemm_rates[dtype] = 2 * n**3 / self._best(lambda: torch.mm(a, b, out=out))
        return self.gemm_rates[dtype]

    @property
    def copy_rate(self) -> float:
        """Bytes per second of the fastest of a few copies, read and written ones."""
        if not self._copy_rate:
            size = self._copy_bytes
            a = torch.ones(size, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a)
            self._copy_rate = 2 * size / self._best(lambda: b.copy_(a))
        return self._copy_rate

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at full rate: products and traffic overlap."""
        products = sum(
            count / self.gemm_rate(dtype) for dtype, count in work.flops.items() if count
        )
        return max(products, work.bytes / self.copy_rate if work.bytes else 0.0)

    def _best(self, run: Callable[[], Any]) -> float:
        tries, spent, best = 0, 0.0, math.inf
        while tries <= TRIES or spent < self._least_seconds:
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
            tries, spent = tries + 1, spent + seconds
            if tries > 1:  # the first one warms up
                best = min(best, seconds)
        return best


def forward_work(
    block: nn.Module,
    config: Any,
    tokens: int,
    length: int,
    skipped: Collection[nn.Module] = (),
) -> Work:
    """One pass of a block: products of its linears and of causal attention.

    Parameters
    ----------
    block
        The block.
    config
        Of the model, for the heads.
    tokens, length
        Tokens in all, and of a sequence.
    skipped
        Linears whose outputs are not needed.
    """
    used = [m for m in block.modules() if is_linear(m) and m not in skipped]
    linears = [matrix(module) for module in used]
    flops = sum(2.0 * tokens * weight.numel() for weight in linears)
    heads = getattr(config, "num_attention_heads", None)
    if heads:
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        # scores and their product with the values, half of each
        flops += 2 * (2.0 * tokens * length * heads * head) / 2
    weight = next(block.parameters())
    return Work({weight.dtype: flops}, float(sum(p.nbytes for p in block.parameters())))


def gram_work(
    widths: Sequence[int],
    pairs: Sequence[bool],
    tokens: int,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """Second moments: half of each gram, and the whole cross-gram of a pair of streams.

    Parameters
    ----------
    widths
        Inputs of each stage.
    pairs
        Whether the dense and the pruned model give a stage different inputs.
    tokens
        Tokens in all.
    dtype
        In which inputs are multiplied, see :func:`layerwise.gram.precision_of`.
    """
    flops = 0.0
    for width, pair in zip(widths, pairs, strict=True):
        flops += tokens * width * (width + 1.0) + pair * 2.0 * tokens * width**2
    return Work({dtype: flops})


def grading_work(shapes: Sequence[tuple[int, int]]) -> Work:
    """One product of every answer with its gram, in float64: what every method pays."""
    return Work({torch.float64: sum(2.0 * out * width**2 for out, width in shapes)})


def run_work(
    model: Any,
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, int]],
    error_correction: str,
    tokens: int,
    length: int,
    device: torch.device,
) -> dict[str, Work]:
    """Work of the stages forward, gram and solve of a run over a model.

    Parameters
    ----------
    model, adapter
        The model and how it is read.
    shapes
        Shape (out, in) of every matrix that is pruned, by its full name.
    error_correction
        Mode of the run, which decides how many passes there are.
    tokens, length
        Tokens in all, and of a sequence.
    device
        Where the run computes.
    """
    forward, widths, pairs = Work(), [], []
    blocks = adapter.blocks_of(model)
    for number, (name, block) in enumerate(blocks.items()):
        ends = [adapter.linear(block, end) for end in adapter.stages_of(name)[-1].linears]
        whole = forward_work(block, model.config, tokens, length)
        inside = forward_work(block, model.config, tokens, length, ends)
        # behind the last block nothing is read: its last linears need not be computed
        through = inside if number == len(blocks) - 1 else whole
        forward += _passes(error_correction, inside, through)
        pruned = [
            [f"{name}.{linear}" for linear in stage.linears if f"{name}.{linear}" in shapes]
            for stage in adapter.stages_of(name)
        ]
        for index, linears in enumerate([names for names in pruned if names]):
            widths.append(shapes[linears[0]][1])
            first = index == 0 and (error_correction == "block" or number == 0)
            pairs.append(error_correction in ("block", "full") and not first)
    return {
        "forward": forward,
        "gram": gram_work(widths, pairs, tokens, precision_of(model.dtype, device)),
        "solve": grading_work(list(shapes.values())),
    }


def _passes(error_correction: str, inside: Work, through: Work) -> Work:
    """Passes over one block: to see the inputs of its linears, or to its end as well."""
    if error_correction == "none":
        return through  # one pass does both
    if error_correction == "sequential":
        return inside if through is inside else inside + through
    if error_correction == "block":
        return through + inside  # dense, pruned
    return through + through
