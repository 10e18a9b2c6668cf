r"""Scores of units of columns, by seven rules; the smallest are removed first.

With W the dense weight and x_j the inputs of column j in the pruned model:

=========  ==========================================================================
score      of a column
=========  ==========================================================================
magnitude  ``sum_i |W_ij|``
wanda      ``sum_i |W_ij| sqrt(G_jj)`` [1]_
wifn       ``mean_i |W_ij| sqrt(G_jj)`` [2]_: the order of `wanda`, on another scale
ifv        ``Var(x_j)`` [2]_
wifv       ``Var(x_j) ||W_:j||^2`` [2]_: the error that remains with the best bias
compat     `wifv` with the statistic that the code of [2]_ computes in place of the
           variance (:mod:`layerwise.fluctuation`), to reproduce its choices
obs        exact rise of the damped objective if only this unit is removed and all others
           are refitted: ``||v_j||^2 / (G^-1)_jj``, v the minimiser without constraint
=========  ==========================================================================

The score of a unit is the sum over its columns, except that `obs` is the joint loss of the
unit. Two more words, `greedy` and `swaps`, name searches, see
:mod:`layerwise.solvers.column.search`.

References
----------
.. [1] H. Hu, P. Zhao, P. Li, Y. Zheng, Z. Wang, X. Yuan, "FASP: Fast and Accurate
   Structured Pruning of Large Language Models", 2025, arXiv:2501.09412.
.. [2] Y. An, X. Zhao, T. Yu, M. Tang, J. Wang, "Fluctuation-based Adaptive Structured
   Pruning for Large Language Models", AAAI 2024, arXiv:2312.11983.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.problem import LayerProblem
from layerwise.solvers.column.support import ColumnSupport

Score = Literal[
    "magnitude", "wanda", "wifn", "ifv", "wifv", "compat", "obs", "greedy", "swaps"
]
SCORES: tuple[str, ...] = get_args(Score)
SEARCHES = ("greedy", "swaps")
COMPAT = "compat"
ABOUT_MEANS = ("ifv", "wifv")


def unit_scores(problem: LayerProblem, units: Tensor, score: str) -> Tensor:
    """Score of every unit, shape (units,), float64.

    Parameters
    ----------
    problem
        The layer as posed; for `obs` the problem that is refitted.
    units
        Unit of each column, shape (in,).
    score
        One of the seven rules.
    """
    scores = problem.weight.new_zeros(int(units.max()) + 1, dtype=torch.float64)
    if score == "obs":
        constant = problem.moments.vanishes  # about the means: a removal is free
        return scores if constant else ColumnSupport(problem, units).changes()
    return scores.index_add_(0, units, _column_scores(problem, score))


def _column_scores(problem: LayerProblem, score: str) -> Tensor:
    """Score of every column, shape (in,), float64."""
    weight = problem.weight.double()
    if score in ABOUT_MEANS:
        variance = problem.centered().gram.diagonal()
        return variance * weight.square().sum(dim=0) if score == "wifv" else variance
    if score == COMPAT:
        fluctuation = problem.moments.fluctuation
        if fluctuation is None:
            message = (
                "score 'compat' needs the fluctuation of the inputs, which a moment "
                "accumulator collects; score 'wifv' needs the gram and the means"
            )
            raise InvalidProblemError(message)
        return fluctuation * weight.square().sum(dim=0)
    size = weight.abs().mean(dim=0) if score == "wifn" else weight.abs().sum(dim=0)
    return size if score == "magnitude" else size * problem.gram.diagonal().sqrt()
