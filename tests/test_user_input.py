"""What users hand in besides problems: answers of own solvers, starts, names of errors."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise import errors, moments
from layerwise.errors import InvalidProblemError, UsageError, VerificationError
from layerwise.problem import LayerProblem
from layerwise.solvers.columns import ColumnPruning
from layerwise.solvers.gblm import GBLM
from layerwise.solvers.wanda import Wanda
from tests.support.contract import bits
from tests.support.problems import make_layer

LAYER = make_layer(51).to(torch.float32)
PROBLEM = LAYER.problem(lw.Unstructured(0.5))


class Own:
    """Returns what a function makes of the problem."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def solve(self, problem: LayerProblem) -> Any:
        return self.make(problem)


def half(problem: LayerProblem) -> Tensor:
    return torch.where(problem.pattern.mask(problem.weight.abs()), problem.weight, 0)


TAKEN = {
    "tensor": half,
    "array": lambda p: half(p).numpy(),
    "tensor with gradient": lambda p: half(p).requires_grad_(),
    "object with array": lambda p: SimpleNamespace(weight=half(p).numpy()),
    "mask of numpy": lambda p: SimpleNamespace(weight=half(p), mask=half(p).numpy() != 0),
    "no history": lambda p: SimpleNamespace(weight=half(p), history=None, stats=None),
    "status as text": lambda p: SimpleNamespace(weight=half(p), status="feasible"),
}
REFUSED = {
    "None": (lambda p: None, UsageError, "got None"),
    "tuple": (lambda p: (half(p),), UsageError, "got tuple"),
    "list": (
        lambda p: SimpleNamespace(weight=half(p).tolist()),
        InvalidProblemError,
        "list",
    ),
    "meta": (lambda p: half(p).to("meta"), InvalidProblemError, "meta device"),
    "dense": (lambda p: p.weight, VerificationError, "outside its mask"),
    "rows": (lambda p: half(p)[:2], VerificationError, r"weight \(2, 16\)"),
    "mask of numbers": (
        lambda p: SimpleNamespace(weight=half(p), mask=half(p)),
        InvalidProblemError,
        "mask of the answer must be a dense tensor of bool",
    ),
    "status": (
        lambda p: SimpleNamespace(weight=half(p), status="good"),
        UsageError,
        "status of an answer is one of optimal",
    ),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_answers_that_are_taken(kind: str) -> None:
    found = lw.solve(PROBLEM, Own(TAKEN[kind]))
    expected = lw.solve(PROBLEM, "magnitude")
    assert torch.equal(bits(found.weight), bits(expected.weight))
    assert torch.equal(found.mask, expected.mask)
    assert found.objective == expected.objective
    assert not found.weight.requires_grad


@pytest.mark.parametrize("kind", REFUSED)
def test_answers_that_are_refused(kind: str) -> None:
    make, error, message = REFUSED[kind]
    with pytest.raises(error, match=message) as caught:
        lw.solve(PROBLEM, Own(make))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("solver", [Own, Wanda, None, 3])
def test_what_is_not_a_solver(solver: Any) -> None:
    message = "is a class, not a solver" if inspect.isclass(solver) else "is not a solver"
    given: list[Any] = [solver]  # not narrowed by the branch above
    with pytest.raises(UsageError, match=message):
        lw.solve(PROBLEM, given[0])
    with pytest.raises(UsageError, match=message):
        lw.chain("wanda", given[0])


@pytest.mark.parametrize("problem", [None, LAYER.weight])
@pytest.mark.parametrize(
    "use",
    [
        lambda problem: lw.solve(problem, "wanda"),
        lw.lower_bounds,
        lambda problem: lw.proven_gap(problem, lw.solve(PROBLEM, "wanda")),
    ],
)
def test_what_is_not_a_problem(use: Any, problem: Any) -> None:
    with pytest.raises(UsageError, match=r"build one with LayerProblem\.from_inputs"):
        use(problem)


def test_bounds_of_an_indefinite_gram_are_refused() -> None:
    gram = 1.9 * torch.eye(8, dtype=torch.float64) - 0.9
    weight = torch.ones(4, 8, dtype=torch.float64)
    problem = LayerProblem.from_moments(weight, moments.Moments(gram), pattern=0.5)
    with pytest.raises(InvalidProblemError, match="indefinite"):
        lw.lower_bounds(problem)


def test_a_start_may_be_a_tensor_or_an_array() -> None:
    start: Any = half(PROBLEM)
    expected = lw.solve(PROBLEM, "swaps", initial=lw.Answer(start))
    for given in (start, start.numpy()):
        assert torch.equal(
            lw.solve(PROBLEM, "swaps", initial=given).weight, expected.weight
        )


def test_options_of_a_wrong_type() -> None:
    wrong: Any = "0.1"
    with pytest.raises(UsageError, match=r"tolerance must be at least 0, got '0\.1'"):
        ColumnPruning(tolerance=wrong)
    with pytest.raises(UsageError, match=r"alpha must be a number >= 0, got '0\.1'"):
        GBLM(alpha=wrong)


def test_every_error_is_reachable_from_the_package() -> None:
    public = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.LayerwiseError)
    ]
    assert len(public) == 10
    for name in public:
        assert getattr(lw, name) is getattr(errors, name)
        assert name in dir(lw)
        assert name in lw.__all__


def test_a_gram_is_checked_once_and_only_if_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[Tensor] = []
    monkeypatch.setattr(moments, "check_definite", lambda gram, _: checked.append(gram))
    lw.solve(LAYER.problem(lw.Unstructured(0.5)), "wanda")
    assert not checked  # summed up from inputs
    given = lw.Moments(PROBLEM.gram)
    assert not checked
    for rows in (4, 6):
        problem = LayerProblem.from_moments(LAYER.weight[:rows], given, pattern=0.5)
        lw.solve(problem, "wanda")
        lw.solve(problem.with_pattern(lw.NM(2, 4)), "magnitude")
    assert len(checked) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_overflowing_weights_are_named(dtype: torch.dtype) -> None:
    """The best weights on one of two equal channels are twice as large."""
    weight = torch.full((2, 2), 3e38, dtype=torch.float32).to(dtype)
    inputs = torch.ones(2, 5, dtype=torch.float64)
    inputs[:, ::2] = -1
    kept = torch.tensor([[True, False]] * 2)
    problem = LayerProblem.from_inputs(
        weight, inputs, pattern=lw.FixedMask(kept), damping=1e-9
    )
    if dtype == torch.float64:
        assert float(lw.solve(problem, "least-squares").weight.max()) > 5e38
        return
    with pytest.raises(lw.SolveError, match=r"reach 3\.0e\+38 and the best ones overflow"):
        lw.solve(problem, "least-squares")
