"""Docstrings of the public names follow numpydoc."""

import inspect
from collections.abc import Iterator

import pytest
from numpydoc.validate import validate

import layerwise
from layerwise.solvers import SOLVERS

# Not required: examples and see-also sections in every docstring, types repeated from
# annotations, a Returns section where the summary says what is returned, the order of
# keywords, and SS05, which takes "Moments" for a verb in the third person.
CHECKS = {
    *("GL01", "GL02", "GL03", "GL05", "GL06", "GL07", "GL08", "GL09", "GL10"),
    *("SS01", "SS02", "SS03", "SS04", "SS06"),
    *("PR02", "PR05", "PR06", "PR07", "PR08", "PR09", "PR10"),
    *("RT02", "RT03", "RT04", "RT05", "YD01"),
}


def _documented() -> Iterator[str]:
    objects = {f"layerwise.{name}": getattr(layerwise, name) for name in layerwise.__all__}
    for make in SOLVERS.values():
        solver = type(make())
        objects[f"{solver.__module__}.{solver.__qualname__}"] = solver
    for path, value in objects.items():
        if not callable(value):
            continue
        yield path
        if inspect.isclass(value):
            for name, member in vars(value).items():
                ours = isinstance(member, property | classmethod) or inspect.isfunction(
                    member
                )
                if ours and not name.startswith("_"):
                    yield f"{path}.{name}"


NAMES = sorted(
    {
        *_documented(),
        "layerwise.solvers.lasso.lasso",
        "layerwise.solvers.lasso_path.lasso_to_sparsity",
    }
)


def test_every_public_name_is_looked_at() -> None:
    assert "layerwise.solve" in NAMES
    assert "layerwise.LayerProblem.from_inputs" in NAMES
    assert "layerwise.solvers.fista.Fista.solve" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name: str) -> None:
    report = validate(name)
    errors = dict(report["errors"])
    failed = {code: text for code, text in errors.items() if code in CHECKS}
    # a list of parameters is complete, but for the name in tables and logs, or absent
    listed = "Parameters\n" in inspect.cleandoc(report["docstring"])
    missing = errors.get("PR01", "").replace("'name', ", "").replace(", 'name'", "")
    if listed and missing not in ("", "Parameters {'name'} not documented"):
        failed["PR01"] = missing
    assert not failed


@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_cites_its_source(solver: str) -> None:
    made = SOLVERS[solver]()
    module = inspect.getmodule(type(made))
    assert module is not None
    assert module.__doc__ is not None
    assert "References\n----------\n.. [1] " in module.__doc__
