r"""Adapprox: AdamW whose second moments are kept as low-rank factors.

Problem: minimise a loss over the parameters of a network, as AdamW does, without storing a
second moment for every weight. For a matrix W (m, n) with gradient G

    V = beta2 max(Q U^T, 0) + (1 - beta2) G^2     Q (m, k), U (n, k): V of the step before
    Q, U = factors of V, of rank k
    N = G / (sqrt(V) + eps), divided by max(1, RMS(N) / clip)
    M = beta1 M + (1 - beta1) N                   or M = N where beta1 is 0
    W = W - lr (M + weight_decay W)

without bias correction: the clip replaces it. Only the factors Q and U of V are stored,
(m + n) k numbers instead of m n; a dense V exists while a matrix is updated. Every
`select_every` steps, k becomes the smallest rank whose error rate is at most
`error_threshold`, but at most `max_rank` times the shorter side. Vectors, and matrices with
fewer than ``1 / max_rank`` rows or columns, keep a dense V. Tensors with more than two
dimensions are flattened to (first, rest).

Cost of a step: 8 m n k operations for the products of a matrix, about 4 min(m, n) k^2 for
its basis, and ten passes over the weights. Matrices of equal shape and rank are one batch.

Deviations from the paper; `PUBLISHED` undoes 1 to 3 as far as the constants are known:

1. `warm_start`: the subspace starts from the previous Q with one iteration, where the paper
   starts from random columns and iterates five times. The error is the same, see
   ``docs/solvers/adapprox.md``.
2. Truncation goes by singular values: the factors are rotated before columns are dropped.
   The paper takes the first columns of a QR decomposition, which are in no order.
3. One selection evaluates all smaller ranks at once, so the rank shrinks without a second
   try; it doubles where it must grow. The published growth is a sigmoid of the error rate.
4. The product of the factors can be negative and is clamped at zero before it is used.
   Then ``V >= (1 - beta2) G^2``, and no entry of N exceeds ``1 / sqrt(1 - beta2)``.
5. Cosine guidance divides by ``1 - cos``, which diverges; the factor is at most ten,
   applies to the step and does not change the stored M.
6. Q belongs to the shorter side of the matrix: the orthonormal basis of a 50257 x 768
   embedding is 768 x k. Error and storage are the same.
7. Random numbers depend only on the seed, the parameter and its step, so that a loaded
   state continues with the same bits.
8. A gradient that is not finite raises before anything changes, where AdamW would spread
   it.
9. The defaults of the learning rate and of weight decay are those of AdamW.

References
----------
.. [1] P. Zhao, P. Li, Y. Gu, Y. Zheng, S. L. Kölker, Z. Wang, X. Yuan, "Adapprox: Adaptive
   Approximation in Adam Optimization via Randomized Low-Rank Matrices", 2024,
   arXiv:2403.14958.
"""

# PyTorch uses its _foreach functions in its own optimizers, but does not export them
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from layerwise.errors import SolveError
from layerwise.solvers.optimizer.directions import (
    Entry,
    batches,
    directions,
    precision,
    prepare,
)
from layerwise.solvers.optimizer.memory import StateBytes, state_bytes

MAX_GUIDANCE = 10.0  # cap of 1 / (1 - cos)

PUBLISHED: Mapping[str, Any] = MappingProxyType(
    {"warm_start": False, "weight_decay": 0.1, "oversampling": 5, "iterations": 5}
)
"""Options of the paper: ``Adapprox(parameters, **PUBLISHED)``."""


class Adapprox(Optimizer):
    """AdamW with second moments of low rank, a drop-in for ``torch.optim.AdamW``.

    Parameters
    ----------
    params
        Parameters or groups of them; every option but `check_finite` can differ by group.
    lr
        Learning rate.
    betas
        Decay of the first and of the second moment. ``(0, beta2)`` keeps no first moment.
    eps
        Added to the square root of the second moment.
    weight_decay
        Decoupled: the weight times this is added to the step.
    clip
        Bound on the root mean square of ``N``; infinity for none.
    max_rank
        Largest rank as a fraction of the shorter side.
    initial_rank
        First rank that is tried, and the smallest.
    error_threshold
        Error rate of the factors at which no larger rank is tried.
    select_every
        Steps from one selection of ranks to the next.
    oversampling
        Random columns that are tried in addition to the rank.
    iterations
        Subspace iterations from a random start.
    warm_start
        Start from the previous factors instead of random columns.
    cosine_guidance
        Divide the step by one minus the cosine of N and M. Needs a first moment.
    seed
        Seed of the random columns.
    check_finite
        Refuse gradients that are not finite; synchronises with the device once per step.

    Raises
    ------
    ValueError
        For an impossible option, as in ``torch.optim``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip: float = 1.0,
        max_rank: float = 0.25,
        initial_rank: int = 1,
        error_threshold: float = 0.01,
        select_every: int = 10,
        oversampling: int = 5,
        iterations: int = 5,
        warm_start: bool = True,
        cosine_guidance: bool = False,
        seed: int = 0,
        check_finite: bool = True,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip": clip,
            "max_rank": max_rank,
            "initial_rank": initial_rank,
            "error_threshold": error_threshold,
            "select_every": select_every,
            "oversampling": oversampling,
            "iterations": iterations,
            "warm_start": warm_start,
            "cosine_guidance": cosine_guidance,
            "seed": seed,
            "check_finite": check_finite,
        }
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own.

        Parameters
        ----------
        param_group
            As in ``torch.optim``: ``{"params": parameters, "lr": 1e-4}``.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.is_complex() or not parameter.is_floating_point():
                self.param_groups.pop()
                message = f"Adapprox needs real parameters, got {parameter.dtype}"
                raise ValueError(message)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient.

        Parameters
        ----------
        closure
            Computes the loss and its gradients once more.

        Raises
        ------
        SolveError
            If a gradient, or the sum of its squares, is not finite. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [
            (group, list(self._entries(i))) for i, group in enumerate(self.param_groups)
        ]
        checked = [entries for group, entries in groups if group["check_finite"]]
        _refuse_non_finite(list(chain.from_iterable(checked)))
        for group, entries in groups:
            for entry in entries:
                prepare(entry, group)
            for batch in batches(entries):
                _move(group, batch, directions(group, batch))
        return loss

    def _entries(self, group: int) -> Iterator[Entry]:
        """Parameters of a group with a gradient."""
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:group])
        for index, parameter in enumerate(self.param_groups[group]["params"], first):
            if parameter.grad is None or parameter.numel() == 0:
                continue
            if parameter.grad.is_sparse:
                message = (
                    f"Adapprox needs dense gradients, parameter {index} has a sparse one"
                )
                raise RuntimeError(message)  # the type that torch.optim raises
            yield Entry(index, parameter, parameter.grad, self.state[parameter])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of ``state_dict``; states keep their precision and are copied.

        Parameters
        ----------
        state_dict
            Of an Adapprox with parameters of the same shapes.
        """
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):  # torch rounds it to the parameter's dtype
                    copied = value.detach().to(parameter.device, copy=True)
                    self.state[parameter][name] = copied

    def memory(self) -> StateBytes:
        """Bytes of the first and second moments, and of all states."""
        return state_bytes(self)

    def ranks(self) -> list[int | None]:
        """Rank of every parameter in order; None where the second moment is dense."""
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        states = [self.state.get(parameter, {}) for parameter in parameters]
        return [state["left"].shape[-1] if "left" in state else None for state in states]


def _check_options(options: Mapping[str, Any]) -> None:
    beta1, beta2 = options["betas"]
    conditions = {
        "lr": options["lr"] >= 0,
        "betas": 0 <= beta1 < 1 and 0 <= beta2 < 1,
        "eps": options["eps"] >= 0,
        "weight_decay": options["weight_decay"] >= 0,
        "clip": options["clip"] > 0,
        "max_rank": 0 <= options["max_rank"] <= 1,
        "initial_rank": options["initial_rank"] >= 1,
        "error_threshold": options["error_threshold"] >= 0,
        "select_every": options["select_every"] >= 1,
        "oversampling": options["oversampling"] >= 0,
        "iterations": options["iterations"] >= 1,
        "cosine_guidance": not options["cosine_guidance"] or beta1 > 0,
    }
    for name, holds in conditions.items():
        if not holds:
            needs = "; it needs a first moment" if name == "cosine_guidance" else ""
            message = f"Invalid {name}: {options[name]}{needs}"
            raise ValueError(message)


def _refuse_non_finite(entries: Sequence[Entry]) -> None:
    """Raise if a gradient is not finite, after one synchronisation with the device."""
    by_dtype: dict[torch.dtype, list[Entry]] = {}
    for entry in entries:
        by_dtype.setdefault(entry.gradient.dtype, []).append(entry)
    for dtype, alike in by_dtype.items():
        gradients = [entry.gradient for entry in alike]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch._foreach_norm(gradients, 2, dtype=wide)
        finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite()
        if not bool(finite.all()):
            bad = alike[int(finite.logical_not().nonzero()[0])]
            message = (
                f"the gradient of parameter {bad.index}, {tuple(bad.parameter.shape)}, or "
                "the sum of its squares is not finite; skip the step, lower the learning "
                "rate, or scale the loss down"
            )
            raise SolveError(message)


def _move(
    group: Mapping[str, Any], batch: Sequence[Entry], normalised: list[Tensor]
) -> None:
    """Update the first moments, then apply weight decay and the step."""
    beta1, lr = group["betas"][0], float(group["lr"])
    steps = normalised
    if beta1 > 0:
        steps = [entry.state["exp_avg"] for entry in batch]
        torch._foreach_lerp_(steps, normalised, 1 - beta1)
        if group["cosine_guidance"]:
            pairs = zip(normalised, steps, strict=True)
            steps = [M * _guidance(N, M, group["eps"]) for N, M in pairs]
    parameters = [entry.parameter for entry in batch]
    # bfloat16 is rounded once, at the end
    precise = [parameter.to(precision(parameter)) for parameter in parameters]
    torch._foreach_mul_(precise, 1 - lr * group["weight_decay"])
    torch._foreach_add_(precise, steps, alpha=-lr)
    for parameter, value in zip(parameters, precise, strict=True):
        if value is not parameter:
            parameter.copy_(value)


def _guidance(N: Tensor, M: Tensor, eps: float) -> Tensor:
    """Factor on the step: above one where N and M agree, one half where they oppose."""
    lengths = torch.linalg.vector_norm(N) * torch.linalg.vector_norm(M)
    cosine = (N * M).sum() / lengths.clamp_min(torch.finfo(N.dtype).tiny)
    factor: Tensor = (1 / (1 - cosine + eps)).clamp(0, MAX_GUIDANCE)
    return factor
