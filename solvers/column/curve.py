r"""The error of a layer against the number of removed units, all points at once.

The units are removed one after the other, so the removed sets are nested, and the whole
curve costs O(in^3 + out in^2).

Without a refit: with E the dense weights of the removed columns,
``f = <E G, E> + 2 <E, S> + drift`` grows by one row and column of ``(W^T W) * G``.

With a refit: order the columns so that those removed last come first, let ``G = L L^T`` be
the damped gram in this order, ``M = L^-1`` and ``c = W_ls L``. The factor of a leading
block of G is the leading block of L. So the removal of column m changes the best weights on
the first m columns by ``- c_m M_m`` (an outer product), and

.. math:: f_m = f(W_\text{ls}) + \sum_{i \ge m} \|c_i\|^2
          - \lambda \Big(\Big\|W - W_\text{ls} + \sum_{i \ge m} c_i M_i\Big\|^2
          - \|W - W_\text{ls}\|^2\Big)

is their undamped objective. Everything is a sum over the removed columns.

References
----------
.. [1] G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th edition, 2013, section 4.2
   (leading blocks of a Cholesky factor).
"""

import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.evaluate import objective_rows
from layerwise.patterns import Columns
from layerwise.problem import LayerProblem
from layerwise.solvers.column.scores import SEARCHES
from layerwise.solvers.column.search import removal_path
from layerwise.solvers.column.support import ColumnSupport
from layerwise.solvers.columns import ColumnPruning


def error_curve(problem: LayerProblem, solver: ColumnPruning) -> Tensor:
    """Objective after the removal of 0, 1, ... units, in the order of the solver's score.

    With heads, every point removes one more unit of every head. Both searches follow the
    greedy path. Solved for one point alone, `greedy` gives this objective, and `swaps` a
    damped objective that is not larger.

    Parameters
    ----------
    problem
        A layer with the pattern :class:`Columns`, whose `keep` is ignored.
    solver
        Score and restoration.

    Returns
    -------
    Tensor
        Shape (units + 1,), or (units per head + 1,); float64, undamped.
    """
    pattern = problem.pattern
    if not isinstance(pattern, Columns):
        message = f"an error curve needs the pattern Columns, got {pattern}"
        raise InvalidProblemError(message)
    scaled, exponent = problem.normalized()
    units = pattern.units(problem.shape[1], problem.weight.device)
    heads = pattern.heads(int(units.max()) + 1, units.device)
    counts = torch.bincount(heads)
    if bool((counts != counts[0]).any()):
        message = f"an error curve needs heads of equal size, got {counts.tolist()[:8]}"
        raise InvalidProblemError(message)
    order = _order(scaled, solver, units, heads)
    # the columns in the order of their units, and how many are removed after each round
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    columns = rank[units].argsort(stable=True)
    sizes = torch.bincount(units)[order].view(-1, len(counts)).sum(dim=1)
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    about = solver.restored(scaled)
    if solver.restoration in ("none", "bias") or about.moments.vanishes:
        errors = _without_refit(about, columns)
    else:
        errors = _with_refit(about, columns)
    return errors[ends].clamp(min=0) * 2.0**exponent


def _order(
    problem: LayerProblem, solver: ColumnPruning, units: Tensor, heads: Tensor
) -> Tensor:
    """Units in the order of their removal, one of every head per round."""
    about = solver.restored(problem)
    if solver.score in SEARCHES and not about.moments.vanishes:
        support = ColumnSupport(about, units)
        return removal_path(support, heads, torch.bincount(heads), solver.step_of(units))
    cheapest = solver.scores(problem, units).argsort(stable=True)
    by_head = cheapest[heads[cheapest].argsort(stable=True)]
    return by_head.view(int(heads.max()) + 1, -1).T.flatten()


def _without_refit(problem: LayerProblem, order: Tensor) -> Tensor:
    """Objective after each removal, shape (in + 1,), with the other weights unchanged."""
    weight = problem.weight.double()[:, order]
    pairs = (weight.T @ weight) * problem.gram[order][:, order]
    growth = pairs.diagonal() + 2 * pairs.tril(-1).sum(dim=1)
    if problem.shift is not None:
        growth = growth + 2 * (weight * problem.shift[:, order]).sum(dim=0)
    return _sums(problem.drift.sum(), growth)


def _with_refit(problem: LayerProblem, order: Tensor) -> Tensor:
    """Objective after each removal, shape (in + 1,), with the other weights refitted."""
    factor = problem.factor(torch.float64)
    problem = problem.with_damping(factor.damping)
    dense = problem.weight.double()
    free = dense if problem.shift is None else dense + factor.solve_rows(problem.shift)
    last_first = order.flip(0)
    gram = problem.damped_gram(torch.float64)[last_first][:, last_first]
    lower = torch.linalg.cholesky(gram)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    steps = free[:, last_first] @ lower  # (out, in): c
    inner = steps.T @ steps
    pairs = inner * (inverse @ inverse.T)
    distance = pairs.diagonal() + 2 * pairs.triu(1).sum(dim=1)
    if problem.shift is not None:
        start = (dense - free)[:, last_first] @ inverse.T
        distance = distance + 2 * (steps * start).sum(dim=0)
    growth = (inner.diagonal() - problem.ridge * distance).flip(0)
    return _sums(objective_rows(problem, free).sum(), growth)


def _sums(start: Tensor, growth: Tensor) -> Tensor:
    return start + torch.nn.functional.pad(growth.cumsum(0), (1, 0))
