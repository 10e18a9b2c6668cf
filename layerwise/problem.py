r"""The layer-wise problem, which every pruning method solves.

.. math:: \min_{\hat W} \|W X - \hat W \hat X\|_F^2 / \text{tokens}
          \quad \text{subject to} \quad \hat W \in \text{pattern}

W is the dense weight (out, in). X are the inputs of the layer in the dense model and Xhat
its inputs in the pruned model, both (in, tokens). Only moments of the inputs are kept:

    objective(What) = <What G, What> - 2 <What, T> + sum(energy),        T = W C

Rows are independent. The code uses the same objective written around the dense weight, in
which nothing large cancels and no term changes with damping. With E = W - What and
S = T - W G = W (C - G),

    objective(What) = <E G, E> + 2 <E, S> + sum(drift),   drift = energy of W (X - Xhat)

Damping adds ``damping * mean(diag G) * ||E||^2``: it pulls towards the dense weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.arrays import Array, check_real, real_tensor
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.forms import row_dots, row_forms, shift_of
from layerwise.linalg import Factor, damped
from layerwise.moments import Moments, even_exponent
from layerwise.patterns import FixedMask, Pattern, PatternLike, as_pattern
from layerwise.validation import (
    check_gradient_norm,
    check_scale,
    check_shape,
    check_sums,
    check_weight,
    largest_entry,
)

if TYPE_CHECKING:
    import cvxpy

OF_THE_DATA = ("target", "shift", "drift")  # row by row, without damping and pattern
CHUNK_TOKENS = 65536
LARGEST_WEIGHT = 1e15  # its square leaves room for sums of squares in float32
LARGEST_DAMPING = 1e30  # a gram with it is finite in float32


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer to prune: dense weight, moments of its inputs, and a sparsity pattern.

    Build it with :meth:`from_inputs` or :meth:`from_moments`. Everything is checked at
    construction, and no tensor is changed.

    Parameters
    ----------
    weight
        Dense weight W, shape (out, in), a tensor or numpy array of float64, float32,
        bfloat16 or float16. Solvers work in float64 if it is float64, else in float32.
    moments
        Moments of the inputs, shared by all matrices that read them.
    pattern
        Set of feasible masks; also a fraction of zeros (``0.5``), or ``"2:4"``.
    energy
        Row sums of ``(W X)^2 / tokens``, shape (out,), float64.
    damping
        Ridge relative to mean(diag(gram)).
    gradient_norm
        Size of the gradient of the model's loss with respect to every weight, shape
        (out, in), for methods that need it. It is linear in the inputs: twice the inputs,
        twice the norm.
    """

    weight: Tensor
    moments: Moments
    pattern: Pattern
    energy: Tensor
    damping: float = 0.01
    gradient_norm: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "energy", "gradient_norm"):  # parameters of a model as well
            value = getattr(self, name)
            if value is not None or name != "gradient_norm":
                object.__setattr__(self, name, real_tensor(value, name))
        object.__setattr__(self, "pattern", as_pattern(self.pattern))
        check_weight(self.weight, self.moments.width, self.moments.gram.device)
        self.pattern.check((self.weight.shape[0], self.weight.shape[1]))
        check_real(self.damping, "damping")
        if not 0 <= self.damping <= LARGEST_DAMPING:
            limit = f" and at most {LARGEST_DAMPING:g}" if self.damping > 1 else ""
            message = f"damping must be a number >= 0{limit}, got {self.damping}"
            raise InvalidProblemError(message)
        check_sums(self.energy, "energy", len(self.weight))
        check_scale(self.weight, self.moments.gram)
        if self.gradient_norm is not None:
            check_gradient_norm(self.gradient_norm, self.weight)

    @classmethod
    def from_inputs(
        cls,
        weight: Array,  # (out, in)
        inputs: Array,  # (in, tokens)
        pruned_inputs: Array | None = None,  # (in, tokens)
        *,
        pattern: PatternLike,
        damping: float = 0.01,
        gradient_norm: Array | None = None,
    ) -> "LayerProblem":
        """Problem from explicit inputs, as in the formula: one column per token.

        Parameters
        ----------
        weight
            Dense weight, shape (out, in).
        inputs
            Inputs of the dense model, shape (in, tokens).
        pruned_inputs
            Inputs of the pruned model, same shape; None if they are the same.
        pattern, damping, gradient_norm
            See :class:`LayerProblem`.
        """
        weight, inputs = real_tensor(weight, "weight"), real_tensor(inputs, "inputs")
        if weight.dim() != 2 or inputs.dim() != 2 or inputs.shape[0] != weight.shape[1]:
            message = (
                f"inputs must be (in, tokens) for a weight (out, in), got inputs "
                f"{tuple(inputs.shape)} and weight {tuple(weight.shape)}"
            )
            raise InvalidProblemError(message)
        others = None
        if pruned_inputs is not None:
            seen = real_tensor(pruned_inputs, "pruned_inputs")
            if seen.shape != inputs.shape:
                message = (
                    f"pruned inputs have shape {tuple(seen.shape)}, the inputs "
                    f"{tuple(inputs.shape)}"
                )
                raise InvalidProblemError(message)
            others = torch.split(seen.T, CHUNK_TOKENS)
        check_shape(weight, weight.shape[1])
        pattern = as_pattern(pattern)
        pattern.check((weight.shape[0], weight.shape[1]))  # before the work
        accumulator = MomentAccumulator(weight.shape[1], [weight], weight.device)
        for index, chunk in enumerate(torch.split(inputs.T, CHUNK_TOKENS)):
            accumulator.update(chunk, None if others is None else others[index])
        return cls.from_moments(
            weight,
            accumulator.moments(),
            pattern=pattern,
            damping=damping,
            drift=accumulator.drift(0),
            gradient_norm=gradient_norm,
        )

    @classmethod
    def from_moments(
        cls,
        weight: Array,
        moments: Moments,
        *,
        pattern: PatternLike,
        energy: Array | None = None,
        drift: Array | None = None,
        damping: float = 0.01,
        gradient_norm: Array | None = None,
    ) -> "LayerProblem":
        """Problem from moments, with energy or drift if dense and pruned inputs differ.

        Parameters
        ----------
        weight, moments, pattern, damping, gradient_norm
            See :class:`LayerProblem`.
        energy
            Row sums of ``(W X)^2 / tokens``, shape (out,).
        drift
            Row sums of ``(W (X - Xhat))^2 / tokens``, shape (out,), as returned by
            :meth:`MomentAccumulator.drift`. The energy follows without cancellation.
        """
        if not isinstance(moments, Moments):
            message = f"moments must be Moments(gram, ...), got {type(moments).__name__}"
            raise InvalidProblemError(message)
        weight = real_tensor(weight, "weight")
        check_weight(weight, moments.width, moments.gram.device)
        check_scale(weight, moments.gram)
        known: dict[str, Tensor] = {}
        if drift is not None:
            drift = real_tensor(drift, "drift").double()
            check_sums(drift, "drift", len(weight))
            if moments.cross_gram is not None:
                known["drift"] = drift
        if energy is None:
            energy = row_forms(weight, moments.gram)
            if moments.cross_gram is not None:
                if drift is None:
                    message = (
                        "dense and pruned inputs differ, so the energy cannot be rebuilt "
                        "from gram and cross_gram: pass energy or drift"
                    )
                    raise InvalidProblemError(message)
                known["shift"] = shift_of(weight, moments)
                energy += known["drift"] + 2 * row_dots(known["shift"], weight)
            energy = energy.clamp(min=0)
        energy = real_tensor(energy, "energy").double()
        gradients = gradient_norm
        if gradients is not None:
            gradients = real_tensor(gradients, "gradient_norm")
        problem = cls(weight, moments, as_pattern(pattern), energy, damping, gradients)
        vars(problem).update(known)  # fills cached properties, which cost products
        return problem

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Working precision of solvers: float64 for a float64 weight, else float32."""
        wide = self.weight.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    @cached_property
    def squares_leave_float32(self) -> bool:
        """Whether squares of the weights over- or underflow in the working precision."""
        largest = largest_entry(self.weight)
        ordinary = largest == 0 or 1 / LARGEST_WEIGHT < largest < LARGEST_WEIGHT
        return self.dtype == torch.float32 and not ordinary

    @property
    def gram(self) -> Tensor:
        """G, shape (in, in), float64."""
        return self.moments.gram

    @property
    def cross_gram(self) -> Tensor:
        """C, shape (in, in), float64; the gram itself if Xhat = X."""
        cross = self.moments.cross_gram
        return self.gram if cross is None else cross

    @cached_property
    def target(self) -> Tensor:
        """T = W C, shape (out, in), float64, undamped."""
        return self.weight.double() @ self.cross_gram

    @cached_property
    def shift(self) -> Tensor | None:
        """S = W (C - G), shape (out, in), float64; None if it is zero."""
        if self.moments.cross_gram is None:
            return None
        return shift_of(self.weight, self.moments)

    @cached_property
    def drift(self) -> Tensor:
        """Objective of the dense weight, row by row, shape (out,), float64.

        Computed from the energy, rounding can make it negative.
        """
        if self.shift is None:
            return torch.zeros_like(self.energy)
        quadratic = row_forms(self.weight, self.gram)
        quadratic += 2 * row_dots(self.shift, self.weight)
        return self.energy - quadratic

    @property
    def ridge(self) -> float:
        """Absolute damping: ``damping * mean(diag(gram))``."""
        return self.damping * self.moments.mean_diagonal

    def damped_gram(self, dtype: torch.dtype) -> Tensor:
        """Gram of the damped problem, a new tensor."""
        return damped(self.gram, self.moments.mean_diagonal, self.damping, dtype)

    def damped(self) -> tuple[Tensor, Tensor]:
        """Gram and target of the damped problem, in the working precision."""
        gram = self.damped_gram(self.dtype)
        return gram, (self.target + self.ridge * self.weight.double()).to(self.dtype)

    def factor(self, dtype: torch.dtype | None = None) -> Factor:
        """Cholesky factor of the damped gram, with a larger damping where needed."""
        return self.moments.factor(self.damping, dtype or self.dtype)

    def factorized(self) -> tuple["LayerProblem", Factor]:
        """Problem at the damping at which the factorization succeeded, and the factor."""
        factor = self.factor()
        return (self.with_damping(factor.damping) if factor.raised else self), factor

    def with_damping(self, damping: float) -> "LayerProblem":
        """Return the same problem with another damping."""
        return self._posed(damping=damping)

    def with_pattern(self, pattern: Pattern) -> "LayerProblem":
        """Return the same problem with another pattern."""
        return self._posed(pattern=pattern)

    def _posed(self, **changes: Any) -> "LayerProblem":
        """Return a problem with other settings on the same data, keeping cached values."""
        posed = replace(self, **changes)
        self._pass_on(posed, lambda value: value)
        return posed

    def _pass_on(self, other: "LayerProblem", change: Callable[[Tensor], Tensor]) -> None:
        """Copy the cached values, each changed, to a problem derived from this one."""
        for name in OF_THE_DATA:
            if name in vars(self):
                value = vars(self)[name]
                vars(other)[name] = None if value is None else change(value)

    def centered(self) -> "CenteredProblem":
        """Return the problem about the means, whose solution comes with a bias.

        Its gram is ``G - muhat muhat^T``, its cross-gram ``C - mu muhat^T`` and its energy
        ``energy - (W mu)^2``. It measures the error that remains with the best bias
        ``W mu - What muhat``, which :func:`layerwise.solve` returns in its solution. A
        problem that is already about the means is returned as it is.
        """
        if isinstance(self, CenteredProblem):
            return self
        moments = self.moments.centered()
        moments.check_definite()
        assert moments.input_mean is not None
        energy = self.energy - (self.weight.double() @ moments.input_mean).square()
        return CenteredProblem(
            self.weight,
            moments,
            self.pattern,
            energy.clamp(min=0),
            self.damping,
            self.gradient_norm,
        )

    def rows(self, selection: slice | Tensor) -> "LayerProblem":
        """Return the problem of some output rows, with their part of the mask.

        Only for a :class:`FixedMask`: rows are independent once the mask is fixed.
        """
        assert isinstance(self.pattern, FixedMask)
        kept = self.pattern.mask(self.weight)[selection]
        gradient_norm = self.gradient_norm
        part = replace(
            self,
            weight=self.weight[selection],
            pattern=FixedMask(kept),
            energy=self.energy[selection],
            gradient_norm=None if gradient_norm is None else gradient_norm[selection],
        )
        self._pass_on(part, lambda value: value[selection])
        return part

    def normalized(self) -> tuple["LayerProblem", int]:
        """Problem scaled by ``2^-k`` so that mean(diag(gram)) is near one, and k.

        The scaling is exact and changes no solution, so grams of any magnitude are solved
        alike. Multiply its objectives by ``2^k`` to get those of this problem. Means and
        `gradient_norm` are linear in the inputs and scale by the square root.

        Raises
        ------
        InvalidProblemError
            If the gram is indefinite, which is checked here, before any answer.
        """
        self.moments.check_definite()
        exponent = even_exponent(self.moments.mean_diagonal)
        if exponent == 0:
            return self, 0
        scale = 2.0**-exponent
        moments = self.moments.scaled(scale)
        gradient_norm = self.gradient_norm
        if gradient_norm is not None:
            gradient_norm = gradient_norm.double() * 2.0 ** (-exponent // 2)
        scaled = replace(
            self,
            moments=moments,
            energy=self.energy * scale,
            gradient_norm=gradient_norm,
        )
        self._pass_on(scaled, lambda value: value * scale)
        return scaled, exponent

    def to_cvxpy(self) -> "cvxpy.Problem":
        """Return the damped problem as a CVXPY model; see `layerwise.cvxpy_model`."""
        from layerwise.cvxpy_model import to_cvxpy

        return to_cvxpy(self)


def check_problem(problem: object) -> None:
    """Raise a UsageError unless it is a problem."""
    if not isinstance(problem, LayerProblem):
        kind = type(problem).__name__
        message = f"a {kind} is not a problem: build one with LayerProblem.from_inputs"
        raise UsageError(message)


@dataclass(frozen=True, eq=False)
class CenteredProblem(LayerProblem):
    """A problem about the means of its inputs; its solutions carry a bias."""
