"""Recipes and options: what text says becomes a solver, or an error with a name."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerwise.configure import (
    configure,
    options_of,
    takes_option,
    with_memory_budget,
)
from layerwise.errors import DataError, InvalidProblemError, UsageError
from layerwise.problem import LayerProblem
from layerwise.run.outputs.recipe import Recipe
from layerwise.solve import Chain, chain, resolve
from layerwise.solvers import SOLVERS
from layerwise.solvers.fista import Fista
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.magnitude import Magnitude
from layerwise.solvers.sparsegpt import SparseGPT


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


# --- files -------------------------------------------------------------------------------


def test_recipe_survives_the_disk(tmp_path: Path) -> None:
    recipe = Recipe(
        model="folder",
        method="wanda+least-squares",
        sparsity="2:4",
        calibration="data.jsonl:text",
        n_sequences=3,
        sequence_length=17,
        error_correction="full",
        targets=["re:.*_proj", "Linear"],
        ignore=[],
        seed=4,
        damping=1e-5,
        options={"least-squares.tolerance": 1e-9, "least-squares.method": "cg"},
    )
    assert Recipe.read(write(tmp_path, recipe.to_yaml())) == recipe


def test_recipe_of_defaults_survives_the_disk(tmp_path: Path) -> None:
    assert Recipe.read(write(tmp_path, Recipe().to_yaml())) == Recipe()
    assert Recipe.read(write(tmp_path, "")) == Recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparsity: 2:4", {"sparsity": "2:4"}),  # YAML would read it to base 60
        ("sparsity: 0.5", {"sparsity": 0.5}),
        ("sparsity: '4:8'", {"sparsity": "4:8"}),
        ("damping: 1e-3", {"damping": 1e-3}),  # YAML would read text
        ("options: {tolerance: 1e-6, refit: false}", {"options": {"refit": False}}),
        ("n_sequences: 12", {"n_sequences": 12}),
    ],
)
def test_what_people_write(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    recipe = Recipe.read(write(tmp_path, text)).model_dump()
    for name, value in expected.items():
        if name == "options":
            assert recipe[name].items() >= value.items()
        else:
            assert recipe[name] == value
            assert type(recipe[name]) is type(value)


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        ("metod: wanda", UsageError, "unknown name 'metod'; known: model, method"),
        ("- wanda", UsageError, "is not a mapping"),
        ("wanda", UsageError, "is not a mapping"),
        ("a: [", DataError, "cannot read recipe"),
        ("n_sequences: many", UsageError, "n_sequences: Input should be a valid integer"),
        ("error_correction: both", UsageError, "'none', 'sequential', 'block' or 'full'"),
        ("group: column", UsageError, "group: Input should be 'row' or 'layer'"),
        ("targets: 3", UsageError, "targets: Input should be a valid list"),
        ("1: 2", UsageError, "1"),
    ],
)
def test_bad_recipes(
    tmp_path: Path, text: str, error: type[Exception], expected: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(error) as caught:
        Recipe.read(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe file"):
        Recipe.read(tmp_path / "none.yaml")
    with pytest.raises(DataError, match="not a regular file"):
        Recipe.read(tmp_path)


def test_recipe_runs_no_code(tmp_path: Path) -> None:
    path = write(tmp_path, "model: !!python/object/apply:os.getcwd []")
    with pytest.raises(DataError, match="cannot read recipe"):
        Recipe.read(path)


def test_names_are_those_of_the_file() -> None:
    assert set(yaml.safe_load(Recipe().to_yaml())) <= set(Recipe.names())


# --- options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("sparsegpt", {"block_size": 32}, SparseGPT(block_size=32)),
        ("fista", {"tolerance": 1}, Fista(tolerance=1.0)),
        ("fista", {"tolerance": "1e-4"}, Fista(tolerance=1e-4)),
        ("fista", {"ratio": 0.3, "refit": False}, Fista(ratio=0.3, refit=False)),
        ("least-squares", {"method": "cg"}, LeastSquares(method="cg")),
        (
            "magnitude+least-squares",
            {"tolerance": 1e-5},
            chain(Magnitude(), LeastSquares(tolerance=1e-5)),
        ),
        (
            "fista+least-squares",
            {"least-squares.tolerance": 1e-5, "max_rounds": 2},
            chain(Fista(max_rounds=2), LeastSquares(tolerance=1e-5)),
        ),
        (
            "fista+least-squares",
            {"tolerance": 0.1},
            chain(Fista(tolerance=0.1), LeastSquares(tolerance=0.1)),
        ),
        (SparseGPT(block_size=3), {}, SparseGPT(block_size=3)),
    ],
)
def test_options_become_fields(method: Any, options: Any, expected: Any) -> None:
    assert configure(method, options) == expected


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("wanda", {"x": 1}, "wanda has no option 'x'; it has: none"),
        ("sparsegpt", {"blocksize": 1}, "no option 'blocksize'; it has: block_size"),
        ("sparsegpt", {"block_size": 2.5}, "option block_size of sparsegpt: Input"),
        ("sparsegpt", {"block_size": True}, "option block_size of sparsegpt"),
        ("sparsegpt", {"block_size": "many"}, "got 'many'"),
        ("sparsegpt", {"block_size": 0}, "block_size must be at least 1"),
        ("fista", {"ratio": "half"}, "option ratio of fista: Input"),
        ("fista", {"refit": "maybe"}, "option refit of fista: Input"),
        ("least-squares", {"method": "qr"}, "'auto', 'direct' or 'cg', got 'qr'"),
        ("wanda+least-squares", {"wanda.tolerance": 1.0}, "no option 'wanda.tolerance'"),
        ("wanda+least-squares", {"fista.tolerance": 1.0}, "least-squares.tolerance"),
        ("sparsegpt", {"name": "mine"}, "no option 'name'"),
        ("fistaa", {}, "did you mean fista"),
        ("wanda+", {}, "unknown method ''"),
    ],
)
def test_bad_options(method: str, options: Any, expected: str) -> None:
    with pytest.raises((UsageError, InvalidProblemError)) as caught:
        configure(method, options)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("name", SOLVERS)
def test_defaults_have_no_options(name: str) -> None:
    assert options_of(configure(name, {})) == {}


@pytest.mark.parametrize(
    "solver",
    [
        SparseGPT(block_size=32),
        Fista(ratio=0.25, metric="diagonal", refit=False),
        chain("wanda", LeastSquares(tolerance=1e-4)),
        chain("fista", LeastSquares(tolerance=1e-4)),  # fista has a tolerance as well
        chain(Fista(max_rounds=2), LeastSquares(method="cg")),
    ],
    ids=lambda solver: solver.name,
)
def test_options_rebuild_the_solver(solver: Any) -> None:
    options = options_of(solver)
    assert options
    assert configure(solver.name, options) == solver


def test_options_of_a_users_own_solver() -> None:
    @dataclass(frozen=True)
    class Mine:
        strength: float = 0.5
        hook: Callable[[], None] = print

        def solve(self, problem: LayerProblem) -> Any: ...

    solver = configure(Mine(), {"strength": "0.25"})
    assert solver.name == "Mine"
    assert options_of(solver) == {"strength": 0.25}
    assert configure(solver, {"Mine.strength": 1}) == resolve(Mine(1.0))
    assert takes_option(chain("wanda", Mine()), "Mine.strength")
    assert not takes_option(Mine(), "own")


def test_memory_budget_goes_to_every_step_that_takes_one() -> None:
    solver = with_memory_budget(configure("fista+least-squares", {}), 1000)
    assert isinstance(solver, Chain)
    assert [vars(step)["memory_budget"] for step in solver.steps] == [1000, 1000]
    assert with_memory_budget(Magnitude(), 1000) == Magnitude()


# --- recipes that attack -----------------------------------------------------------------

LAUGHS = "\n".join(
    [
        "a: &a [x, x, x, x, x, x, x, x, x, x]",
        *(
            f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]"
            for before, name in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "targets: *i",
    ]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "references"),
        ("targets: &t [Linear]\nignore: *t\n", "references"),
        ("base: &b {method: wanda}\n<<: *b\n", "references"),
        ("options: " + "[" * 3000 + "]" * 3000, "inside values"),
        ("options: " + "{a: " * 3000 + "1" + "}" * 3000, "inside values"),
        ("targets:\n" + "".join(" " * n + "-\n" for n in range(1, 300)), "inside values"),
        ("method: wanda\nmethod: fista\n", "'method' appears twice"),
        ("options: {steps: 1, steps: 2}\n", "'steps' appears twice"),
        ("seed: " + "9" * 5000, "limit"),
        ("method: " + "w" * 200_000, "longer than"),
        ("method: !!python/object/apply:os.system [true]", "could not determine"),
        ("method: \x00", "unacceptable character"),
    ],
)
def test_recipe_that_attacks_is_refused_at_once(
    text: str, expected: str, tmp_path: Path
) -> None:
    path, start = write(tmp_path, text), time.perf_counter()
    with pytest.raises(DataError, match=f"cannot read recipe .*{expected}") as caught:
        Recipe.read(path)
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"model": ["x" * 10**6]}, "model"),
        ({"options": {"a": [["y" * 10**6] * 1000]}}, "options"),
        ({"sparsity": {"z" * 10**6: 1}}, "sparsity"),
        ({"n_sequences": "1" * 10**5}, "n_sequences"),
        ({"w" * 10**6: 1}, "unknown name"),
    ],
)
def test_what_an_error_quotes_is_short(values: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=field) as caught:
        Recipe.check(values, "the recipe")
    assert len(str(caught.value)) < 1001


def test_recipe_that_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.yaml")
    for path in (pipe, tmp_path, Path(os.devnull)):
        with pytest.raises(DataError, match="is not a regular file"):
            Recipe.read(path)


@pytest.mark.parametrize("name", ["targets", "ignore"])
def test_one_entry_may_stand_alone(name: str, tmp_path: Path) -> None:
    """As in prune_model, which takes one name or several."""
    recipe = Recipe.read(write(tmp_path, f"{name}: re:.*q_proj\n"))
    assert getattr(recipe, name) == ["re:.*q_proj"]
    with pytest.raises(UsageError, match=f"{name}: Input should be a valid list, got 3"):
        Recipe.read(write(tmp_path, f"{name}: 3\n"))
