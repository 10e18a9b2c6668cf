r"""The multiple-choice knapsack: one option per class, enough cost, least error.

.. math:: \min_x \sum_i e_i(x_i) \quad\text{subject to}\quad
          b \le \sum_i c_i(x_i) < b + \text{largest step},

where x_i is an option of class i. Three steps, all exact:

1. The linear relaxation replaces every curve e_i(c_i) by its lower convex hull. Its
   solution takes the segments of all hulls in the order of their slopes until the budget
   is met; the slope of the last one is the price p of a unit of cost.
2. At that price an option has the charge ``r = e - p c - min(e - p c) >= 0``. The error of
   any choice exceeds the relaxation by the sum of its charges plus p times its overshoot
   of the budget. So an option whose charge alone reaches the excess of a known choice is
   not part of a better one.
3. The remaining options are few. Their choices are enumerated class by class. Of partial
   choices with the same cost only the best is kept, so their number stays small, because
   costs are multiples of a few numbers.

References
----------
.. [1] H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", Springer 2004, chapter
   11 (relaxation and reduction of the multiple-choice problem).
.. [2] D. Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
   European Journal of Operational Research 83 (1995) (enumeration of a core).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

ROUNDING = 1e-12  # share of the total cost by which a budget may be missed
MOST_STATES = 1 << 13  # partial choices that are kept


@dataclass(frozen=True, eq=False)
class Options:
    """One class: costs strictly increasing from zero, and the error of each option."""

    costs: Array
    errors: Array

    @property
    def largest_step(self) -> float:
        """Largest cost between neighbours; zero for a single option."""
        return float(np.diff(self.costs).max(initial=0.0))


@dataclass(frozen=True)
class KnapsackSolution:
    """Index of the chosen option of every class.

    Parameters
    ----------
    options
        Chosen options. Among equal errors, a choice from which no step can be given back.
    price
        Slope of the relaxed optimum at the budget, from below; zero if the options of least
        error meet the budget.
    gap
        Largest possible distance of the error from the optimum: zero if it is proven to be
        optimal, otherwise its distance from the relaxation.
    """

    options: list[int]
    price: float
    gap: float


def choose(classes: Sequence[Options], budget: float) -> KnapsackSolution:
    """Choose options of least error that together cost at least `budget`.

    Parameters
    ----------
    classes
        The last options together must cost at least `budget`.
    budget
        Least total cost. It is exceeded by less than the largest step of all classes,
        also where spending more would lower the error.
    """
    largest_step = max(options.largest_step for options in classes)
    most = sum(float(options.costs[-1]) for options in classes)
    window = _Window(max(budget - ROUNDING * most, 0.0), largest_step * (1 - ROUNDING))
    relaxed, split, price = _relaxation(classes, window.least)
    core = _Core(classes, [_charges(options, price) for options in classes], price, window)
    known = _round_up(classes, core.charges, relaxed, split, window)
    proven = False
    while not proven:  # a better choice gives a smaller core, which may then be proven
        better, proven = core.search(known)
        if core.excess(better) >= core.excess(known):
            break
        known = better
    gap = 0.0 if proven else core.excess(known)
    return KnapsackSolution(_give_back(classes, known, window), price, gap)


@dataclass(frozen=True)
class _Window:
    """Accepted total costs: at least `least`, and less than `width` above it."""

    least: float
    width: float


def _cost(classes: Sequence[Options], choice: Sequence[int]) -> float:
    return float(sum(options.costs[i] for options, i in zip(classes, choice, strict=True)))


def _charges(options: Options, price: float) -> Array:
    reduced = options.errors - price * options.costs
    charges: Array = reduced - reduced.min()
    return charges


def _relaxation(
    classes: Sequence[Options], budget: float
) -> tuple[list[int], int | None, float]:
    """Hull vertices below the relaxed optimum, the class split there, and its slope."""
    hulls = [_hull(options) for options in classes]
    choice = [hull[0] for hull in hulls]
    segments = []
    for index, (options, hull) in enumerate(zip(classes, hulls, strict=True)):
        rise, run = np.diff(options.errors[hull]), np.diff(options.costs[hull])
        slopes = np.maximum.accumulate(rise / run)  # convex up to rounding
        ends = zip(slopes.tolist(), hull[1:], strict=True)
        segments += [(slope, index, end) for slope, end in ends]
    segments.sort(key=lambda segment: segment[0])  # stable: within a class by cost
    total = _cost(classes, choice)
    if total >= budget:
        return choice, None, 0.0
    for slope, index, end in segments:
        costs = classes[index].costs
        total += float(costs[end] - costs[choice[index]])
        if total >= budget:
            return choice, index, slope
        choice[index] = end
    message = "the options together do not reach the budget"
    raise AssertionError(message)


def _hull(options: Options) -> list[int]:
    """Vertices of the lower convex hull, starting at the option of least error."""
    costs, errors = options.costs.tolist(), options.errors.tolist()
    first = int(options.errors.argmin())
    hull = [first]
    for new in range(first + 1, len(costs)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            rise, run = errors[b] - errors[a], costs[b] - costs[a]
            if rise * (costs[new] - costs[b]) < (errors[new] - errors[b]) * run:
                break
            hull.pop()
        hull.append(new)
    return hull


def _round_up(
    classes: Sequence[Options],
    charges: Sequence[Array],
    relaxed: Sequence[int],
    split: int | None,
    window: _Window,
) -> list[int]:
    """A choice inside the window, near the relaxed one."""
    choice = list(relaxed)
    if split is not None:
        needed = window.least - _cost(classes, choice) + classes[split].costs[choice[split]]
        # the segment that crosses the budget ends at an option with enough cost
        enough = np.flatnonzero(classes[split].costs >= needed)
        choice[split] = int(enough[charges[split][enough].argmin()])
    # if errors fall with the cost, the choice may exceed the budget by too much
    while any(choice) and _cost(classes, choice) - window.least >= window.width:
        choice[_cheapest_step_back(classes, choice)] -= 1
    return choice


def _cheapest_step_back(classes: Sequence[Options], choice: Sequence[int]) -> int:
    """Class in which one step less adds the least error."""
    return min(
        (index for index, at in enumerate(choice) if at),
        key=lambda i: classes[i].errors[choice[i] - 1] - classes[i].errors[choice[i]],
    )


@dataclass(frozen=True, eq=False)
class _Core:
    """Search among the options that can still improve a known choice."""

    classes: Sequence[Options]
    charges: Sequence[Array]
    price: float
    window: _Window

    def excess(self, choice: Sequence[int]) -> float:
        """Error above the relaxed optimum."""
        paid = sum(float(c[i]) for c, i in zip(self.charges, choice, strict=True))
        spare = _cost(self.classes, choice) - self.window.least
        return paid + self.price * max(spare, 0.0)

    def search(self, known: list[int]) -> tuple[list[int], bool]:
        """Best choice, and whether the search was complete."""
        bound = self.excess(known) * (1 - ROUNDING)
        if bound <= 0:
            return known, True
        left = [
            np.flatnonzero((charge < bound) | (np.arange(len(charge)) == at))
            for charge, at in zip(self.charges, known, strict=True)
        ]
        moves = [
            options.costs[kept] - options.costs[at]
            for options, kept, at in zip(self.classes, left, known, strict=True)
        ]
        low, high = (_tails([pick(m) for m in moves]) for pick in (np.min, np.max))
        # per partial choice: overshoot with all other classes as known, charges so far
        over = np.array([_cost(self.classes, known) - self.window.least])
        paid = np.zeros(1)
        trail: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
        proven = True
        for index, kept in enumerate(left):
            over = (over[:, None] + moves[index]).ravel()
            paid = (paid[:, None] + self.charges[index][kept]).ravel()
            least = over + low[index]
            possible = (over + high[index] >= 0) & (least < self.window.width)
            possible &= paid + self.price * np.maximum(least, 0) < bound
            alive = np.flatnonzero(possible)
            alive, complete = self._best_of_equal_cost(alive, over, paid)
            proven &= complete
            if not alive.size:
                return known, proven
            trail.append(np.divmod(alive, len(kept)))
            over, paid = over[alive], paid[alive]
        state = int((paid + self.price * np.maximum(over, 0)).argmin())
        choice = []
        for kept, (parent, option) in zip(reversed(left), reversed(trail), strict=True):
            choice.append(int(kept[option[state]]))
            state = int(parent[state])
        return choice[::-1], proven

    def _best_of_equal_cost(
        self, alive: npt.NDArray[np.intp], over: Array, paid: Array
    ) -> tuple[npt.NDArray[np.intp], bool]:
        """One partial choice per cost; if there are too many costs, merge close ones."""
        cell = max(self.window.least, self.window.width) * ROUNDING
        complete = True
        while True:
            cells = np.rint(over[alive] / cell)
            order = np.lexsort((paid[alive] + self.price * over[alive], cells))
            first = np.diff(cells[order], prepend=np.nan) != 0
            if np.count_nonzero(first) <= MOST_STATES:
                return alive[order[first]], complete
            spread = float(np.ptp(over[alive]))
            cell, complete = max(2 * cell, spread / MOST_STATES), False


def _tails(values: Sequence[float]) -> Array:
    """Sums of all values after each one."""
    return np.append(np.cumsum(np.asarray(values)[::-1])[::-1], 0.0)[1:]


def _give_back(
    classes: Sequence[Options], choice: Sequence[int], window: _Window
) -> list[int]:
    """Undo steps that neither the budget nor the error needs."""
    given = list(choice)
    spare = _cost(classes, given) - window.least
    for index, options in enumerate(classes):
        while at := given[index]:
            step = float(options.costs[at] - options.costs[at - 1])
            if step > spare or options.errors[at - 1] > options.errors[at]:
                break
            given[index], spare = at - 1, spare - step
    return given
