r"""GBLM: the Wanda score plus the weight times the size of its loss gradient.

.. math:: \text{score}_{ij} = |W_{ij}| \sqrt{G_{jj}} + \alpha\, |W_{ij}|\, \gamma_{ij}

Here gamma is a norm over the calibration sequences of the gradient of the loss of the
dense model with respect to the weight. The problem carries it as `gradient_norm`;
:mod:`layerwise.run.pipeline.gradients` collects it in two scalings, with g_s the
gradient of the mean next-token loss of sequence s, N sequences and L tokens in each:

========  ====================================  =================================
scaling   l1                                    l2
========  ====================================  =================================
mean      ``sum_s |g_s| / N``                   ``sqrt(sum_s g_s^2 / N)``
paper     ``sum_s |g_s| / sqrt(L)``             ``sqrt(sum_s g_s^2 / L)``
========  ====================================  =================================

In the paper, the first term is ``||Xhat_j||`` of a mean sequence, that is,
``sqrt(L G_jj)``, and the second term is 100 times a *sum* over sequences. The scaling of
the second row gives the published order of the scores, with a gradient term that grows with
N. The scaling of the first row does not grow with N. Its default alpha equals the paper's
weight at N = 128 and L = 2048: ``100 N / sqrt(L) = 283`` for l1 and
``100 sqrt(N / L) = 25`` for l2.

References
----------
.. [1] R. J. Das, M. Sun, L. Ma, Z. Shen, "Beyond Size: How Gradients Shape Pruning
   Decisions in Large Language Models", arXiv:2311.04902, section 3 (GBLM-Pruner).

Notes
-----
Deviations: (1) the scaling by means, undone by ``scaling="paper"``; (2) gradients are
summed in float32; the published half precision loses small terms and saturates; (3) ties go
by index.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor

from layerwise.chunks import all_finite
from layerwise.errors import InvalidProblemError
from layerwise.problem import LayerProblem
from layerwise.solvers.options import check_finite, check_one_of
from layerwise.solvers.scored import ScoreSolver
from layerwise.solvers.wanda import wanda_scores

PAPER_ALPHA = 100.0
PAPER_SEQUENCES, PAPER_LENGTH = 128, 2048

DEFAULT_ALPHA: Mapping[tuple[str, str], float] = MappingProxyType(
    {
        ("mean", "l1"): PAPER_ALPHA * PAPER_SEQUENCES / PAPER_LENGTH**0.5,
        ("mean", "l2"): PAPER_ALPHA * (PAPER_SEQUENCES / PAPER_LENGTH) ** 0.5,
        ("paper", "l1"): PAPER_ALPHA,
        ("paper", "l2"): PAPER_ALPHA,
    }
)


@dataclass(frozen=True)
class GBLM(ScoreSolver):
    """Mask from weight times input norm and loss gradient, weights unchanged.

    Cost O(out in), and one backward pass per calibration sequence for the whole model.

    Parameters
    ----------
    alpha
        Weight of the gradient term. The default follows the paper: 283 for the l1 norm and
        25 for l2 with ``scaling="mean"``, 100 with ``scaling="paper"``.
    norm
        Norm over the calibration sequences, ``"l1"`` or ``"l2"``.
    scaling
        ``"mean"`` over the sequences, or the sum of the ``"paper"``, with which the weight
        of the gradient grows with the number of sequences. `norm` and `scaling` decide what
        a run collects; they do not change a `gradient_norm` that is given.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram", "gradient"})
    name: str = "gblm"
    alpha: float | None = None
    norm: Literal["l1", "l2"] = "l1"
    scaling: Literal["mean", "paper"] = "mean"

    def __post_init__(self) -> None:
        check_one_of(self, "norm", "l1", "l2")
        check_one_of(self, "scaling", "mean", "paper")
        if self.alpha is not None:
            check_finite(self, "alpha")

    def scores(self, problem: LayerProblem) -> Tensor:
        """``|W| (sqrt(G_jj) + alpha gamma)``."""
        if problem.gradient_norm is None:
            message = (
                "gblm needs the gradients of the model's loss: give the problem "
                "gradient_norm, shape (out, in), or use prune_model, which collects it"
            )
            raise InvalidProblemError(message)
        alpha = self.alpha
        if alpha is None:
            alpha = DEFAULT_ALPHA[self.scaling, self.norm]
        size = problem.weight.to(problem.dtype).abs()
        gradient = problem.gradient_norm.to(problem.dtype)
        scores = wanda_scores(problem) + alpha * (size * gradient)
        if not all_finite(scores):  # beyond float32
            gradient = problem.gradient_norm.double()
            scores = wanda_scores(problem).double() + alpha * (size.double() * gradient)
        if not all_finite(scores):
            message = (
                f"gradient_norm reaches {float(gradient.max()):.1e}, and its products "
                f"with the weights overflow: multiply it by a power of two"
            )
            raise InvalidProblemError(message)
        return scores
