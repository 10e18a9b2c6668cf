"""Imports point one way, and importing the package loads torch and nothing heavier."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = {("layerwise", "solvers"), ("layerwise", "adapters")}  # to the folders themselves

SOLVERS, ADAPTERS, SOLVE = "layerwise.solvers", "layerwise.adapters", "layerwise.solve"
APPLICATION = ("layerwise.run", "layerwise.recovery", "layerwise.cli", "layerwise.demo")
HEAVY = ("transformers", "cvxpy", "pydantic", "typer", "datasets", "ray")
BANNED = {
    "core": (SOLVERS, ADAPTERS, SOLVE, *APPLICATION, *HEAVY),
    "solve": (ADAPTERS, *APPLICATION, *HEAVY),
    "root": (ADAPTERS, "layerwise.cli", "layerwise.demo", *HEAVY),
    "solvers": (ADAPTERS, SOLVE, *APPLICATION, *HEAVY),
    "adapters": (SOLVERS, SOLVE, *APPLICATION, "cvxpy"),
    "run": ("layerwise.cli", "layerwise.recovery", "typer"),
    "recovery": ("layerwise.cli", "typer"),
    "demo": (),
    "cli": (),
}
DEMO_MAY_IMPORT = (
    "layerwise.errors",
    "layerwise.demo",
    "layerwise.adapters.selective_scan",  # trains the packaged Mamba
)
WORKERS_MAY_IMPORT = ("layerwise.errors", "layerwise.run.workers")  # they know no models
# cvxpy is imported inside the one function that needs it, and for its type
MAY_NAME_CVXPY = {"layerwise/cvxpy_model.py", "layerwise/problem.py"}


def layer_of(path: str) -> str:
    """Layer of the architecture that a source file belongs to."""
    parts = path.split("/")
    if parts[0] != "layerwise":
        return parts[0]
    if len(parts) > 2:
        return parts[1]
    special = {
        "__init__.py": "root",
        "__main__.py": "cli",
        "solve.py": "solve",
    }
    return special.get(parts[1], "core")


SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("layerwise", "solvers", "adapters")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).parts[:2] not in LINKS
)


def imported_names(source: str) -> list[str]:
    """Absolute dotted names of everything imported, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names += [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(path: str, source: str) -> list[str]:
    layer, names = layer_of(path), imported_names(source)
    found = [name for name in names if inside(name, BANNED[layer]) or name[0] == "."]
    if path in MAY_NAME_CVXPY:
        found = [name for name in found if name != "cvxpy"]
    ours = [name for name in names if inside(name, ("layerwise",))]
    if layer == "demo":
        found += [name for name in ours if not inside(name, DEMO_MAY_IMPORT)]
    if path.startswith("layerwise/run/workers/"):
        found += [name for name in ours if not inside(name, WORKERS_MAY_IMPORT)]
    if layer in ("core", "solvers", "adapters"):  # the root would close a circle
        tree = ast.walk(ast.parse(source))
        found += [
            "layerwise"
            for node in tree
            if isinstance(node, ast.ImportFrom) and node.module == "layerwise"
        ]
    return found


def test_every_layer_has_sources() -> None:
    layers = {layer_of(path) for path in SOURCES}
    assert {"core", "root", "solve", "solvers", "adapters", "run", "cli", "demo"} <= layers
    assert layers <= set(BANNED)


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_inwards(path: str) -> None:
    assert not violations(path, (ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layerwise/problem.py", "from layerwise.solvers.fista import Fista"),
        ("layerwise/problem.py", "from layerwise.solve import solve"),
        ("layerwise/problem.py", "def f():\n    import transformers.models"),
        ("layerwise/evaluate.py", "import cvxpy"),
        ("layerwise/solve.py", "from layerwise.run.prune import prune_model"),
        ("solvers/fista.py", "from layerwise import adapters"),
        ("solvers/fista.py", "from layerwise import solve"),
        ("solvers/fista.py", "from . import lasso"),
        ("adapters/opt.py", "import layerwise.solvers.wanda"),
        ("adapters/opt.py", "from layerwise.run import pipeline"),
        ("layerwise/run/deep/er.py", "from layerwise import cli"),
        ("layerwise/run/workers/pool.py", "from layerwise.run import pipeline"),
        ("layerwise/demo/train.py", "from layerwise.solvers import SOLVERS"),
    ],
)
def test_each_rule_can_be_broken(path: str, source: str) -> None:
    assert violations(path, source)


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = python("import layerwise, sys; print(*sys.modules)")
    assert loaded.returncode == 0, loaded.stderr
    modules = set(loaded.stdout.split())
    assert {"torch", "layerwise.solvers.fista"} <= modules
    assert not modules & set(HEAVY)


IMPORT_BY_SHORT_NAME = """
for folder in ("solvers", "adapters"):
    try:
        __import__(folder)
    except ImportError as error:
        print(error)
"""


def test_folders_cannot_be_imported_under_their_short_name() -> None:
    outcome = python(IMPORT_BY_SHORT_NAME)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines() == [
        "import layerwise.solvers, not the folder it lies in",
        "import layerwise.adapters, not the folder it lies in",
    ]
