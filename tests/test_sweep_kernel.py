"""The fused sweep against the sweep column by column.

It runs on a GPU where there is one, and elsewhere in the interpreter of Triton, if that is
installed and asked for: ``TRITON_INTERPRET=1 pytest tests/test_sweep_kernel.py``.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.patterns import FixedMask, Pattern, Unstructured
from layerwise.solvers import sparsegpt
from tests.support.problems import make_layer
from tests.support.tolerances import EQUIVARIANCE, FUSED_SWEEP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def sweep_block() -> Callable[..., None]:
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    pytest.importorskip("triton", reason="Triton is not installed")
    from layerwise.solvers.sweep_kernel import sweep_block

    return sweep_block


def random_sweep(width: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """V, start, carry and mask of a sweep."""
    inputs = torch.randn(width, 3 * width, dtype=dtype)
    gram = inputs @ inputs.T / width
    upper = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1).contiguous()
    start, carry = (torch.randn(width, rows, dtype=dtype) for _ in range(2))
    mask = torch.rand(width, rows) > 0.5
    return upper.to(DEVICE), start.to(DEVICE), carry.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("rows", "width", "block"),
    [
        (40, 100, slice(16, 80)),
        (7, 20, slice(3, 4)),
        (70, 140, slice(10, 138)),
        (1, 9, slice(0, 9)),
    ],
)
def test_block_is_that_of_the_columns(
    rows: int,
    width: int,
    block: slice,
    dtype: torch.dtype,
    sweep_block: Callable[..., None],
) -> None:
    upper, start, carry, mask = random_sweep(width, rows, dtype)
    expected, errors, found, found_errors = (torch.zeros_like(start) for _ in range(4))
    pivots = upper.diagonal().tolist()
    sparsegpt._sweep_columns(
        pivots, upper, start, carry.clone(), expected, errors, mask, block
    )
    sweep_block(upper, start, carry, found, found_errors, mask, block)
    slack = FUSED_SWEEP[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=slack)
    torch.testing.assert_close(found_errors, errors, rtol=0, atol=slack)
    assert not found[block][~mask[block]].any()


@pytest.mark.parametrize("block_size", [7, 128])
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.6, "layer"), "fixed"], ids=str
)
def test_solver_with_the_kernel(
    pattern: Pattern | str,
    block_size: int,
    sweep_block: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(61, rows=5, width=150, tokens=300, drift=0.2, correlation=0.8)
    if isinstance(pattern, str):
        pattern = FixedMask(Unstructured(0.5).mask(torch.randn(5, 150)))
    problem = layer.problem(pattern)
    solver = sparsegpt.SparseGPT(block_size=block_size)
    expected = lw.solve(problem, solver)
    calls = []

    def fused(*args: Any) -> None:
        calls.append(args[-1])
        sweep_block(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args))

    monkeypatch.setattr(sparsegpt, "_fused_sweep", lambda *_: fused)
    found = lw.solve(layer.to(DEVICE).problem(pattern), solver)
    assert len(calls) == -(-150 // block_size)
    assert torch.equal(found.mask.cpu(), expected.mask)
    weight = found.weight.cpu()
    torch.testing.assert_close(weight, expected.weight, rtol=0, atol=EQUIVARIANCE)


def test_processors_do_without() -> None:
    like = torch.ones(2, 2)
    assert sparsegpt._fused_sweep(like, Unstructured(0.5), 128) is None
