"""Floors: imports point one way, and `import layerwise` loads torch and nothing heavier."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = {("layerwise", "solvers"), ("layerwise", "adapters")}  # to the folders themselves

HEAVY = ("transformers", "cvxpy", "pydantic", "typer", "datasets", "ray", "lm_eval")
# The law: a module imports from its own floor and from those before it, never from a later
# one. A floor is a package or a single module, and belongs to the longest name that fits.
FLOORS = (
    "layerwise",  # the mathematics: every module that is not named below
    "layerwise.solvers",
    "layerwise.adapters",
    "layerwise.solve",
    "layerwise.configure",
    "layerwise.demo",
    "layerwise.run.steps",
    "layerwise.run.remaining",
    "layerwise.run.checkpoints",
    "layerwise.run.workers",
    "layerwise.run.stopwatch",
    "layerwise.run.capacity",
    "layerwise.run.activations",
    "layerwise.run.data",
    "layerwise.run.models",
    "layerwise.run.pipeline",
    "layerwise.run.channels",
    "layerwise.run.report",
    "layerwise.run.outputs",
    "layerwise.run.settings",
    "layerwise.run.prune",
    "layerwise.recovery",
    "layerwise.grams",
    "layerwise.timing",
    "layerwise.planning",
    "layerwise.experiments",
    "layerwise.reports",
    "layerwise.cli",
)
# floors that load nothing but torch and numpy, so that `import layerwise` is quick
LIGHT = FLOORS[: FLOORS.index("layerwise.demo")]
# what floors must not import besides
BANNED = {
    "layerwise.adapters": ("layerwise.solvers", "cvxpy"),
    "layerwise.run.workers": ("layerwise.solvers", "layerwise.adapters", "layerwise.solve"),
    "layerwise.demo": ("layerwise.solvers", "layerwise.solve"),
}
TYPER_ALONE = "layerwise.cli"
DEMO_MAY_IMPORT = (
    "layerwise.errors",
    "layerwise.demo",
    "layerwise.adapters.selective_scan",  # trains the packaged Mamba
)
WORKERS_MAY_IMPORT = ("layerwise.errors", "layerwise.run.workers")  # they know no models
# heavy packages that a light module imports inside the one function that needs them
MAY_NAME = {
    "layerwise/cvxpy_model.py": ("cvxpy",),
    "layerwise/problem.py": ("cvxpy",),  # for its type
    "layerwise/configure.py": ("pydantic",),
    "adapters/linear.py": ("transformers",),
    "adapters/auto.py": ("transformers",),
    "adapters/selective_scan.py": ("transformers",),
}
# the one circle: problem.to_cvxpy() is promised, and imported when it is called (ADR 0005)
LAZY = ("layerwise.problem", "layerwise.cvxpy_model")


def module_of(path: str) -> str:
    """Dotted name of a source file."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == "layerwise" else ["layerwise", *parts])


def floor_of(module: str) -> int:
    """Index of the floor that a module, or a name in it, belongs to."""
    fits = [floor for floor in FLOORS if inside(module, (floor,))]
    return FLOORS.index(max(fits, key=len))


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("layerwise", "solvers", "adapters")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).parts[:2] not in LINKS
)


ENTRANCES = ("layerwise/__init__.py", "layerwise/__main__.py")


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


def violations(path: str, source: str) -> list[str]:
    module, names = module_of(path), imported_names(source)
    own = floor_of(module)
    ours = [name for name in names if inside(name, ("layerwise",))]
    banned = BANNED.get(FLOORS[own], ())
    found = [name for name in names if name[0] == "." or inside(name, banned)]
    if FLOORS[own] in LIGHT:
        banned = tuple(set(HEAVY) - set(MAY_NAME.get(path, ())))
        found += [name for name in names if inside(name, banned)]
    if FLOORS[own] != TYPER_ALONE:
        found += [name for name in names if inside(name, ("typer",))]
    if path not in ENTRANCES:  # they import lazily what they offer
        found += [name for name in ours if floor_of(name) > own]
        found += [name for name in ours if name.count(".") == 1 and root_name(name)]
    if FLOORS[own] == "layerwise.demo":
        found += [name for name in ours if not inside(name, DEMO_MAY_IMPORT)]
    if FLOORS[own] == "layerwise.run.workers":
        found += [name for name in ours if not inside(name, WORKERS_MAY_IMPORT)]
    return found


def root_name(name: str) -> bool:
    """Whether ``layerwise.name`` is taken from the package root, which closes a circle."""
    first = name.split(".")[1]
    modules = {module_of(path).split(".")[1] for path in SOURCES if path not in ENTRANCES}
    return first not in modules


def test_every_floor_has_sources() -> None:
    assert {floor_of(module_of(path)) for path in SOURCES} == set(range(len(FLOORS)))


def test_no_module_of_the_run_lies_between_the_floors() -> None:
    """A new package of the run must be given its floor."""
    for path in SOURCES:
        module = module_of(path)
        is_package = module in ("layerwise.run", "layerwise.solvers")
        if inside(module, ("layerwise.run",)) and not is_package:
            assert floor_of(module), module


def test_no_file_imports_itself_in_a_circle() -> None:
    modules = {module_of(path): path for path in SOURCES if path not in ENTRANCES}
    graph = {}
    for module, path in modules.items():
        names = imported_names((ROOT / path).read_text(encoding="utf-8"))
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in found if name in modules} - {module}
    user, used = LAZY
    graph[user].remove(used)
    TopologicalSorter(graph).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter({**graph, user: {*graph[user], used}}).prepare()


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_inwards(path: str) -> None:
    assert not violations(path, (ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("layerwise/problem.py", "from layerwise.solvers.fista import Fista"),
        ("layerwise/problem.py", "from layerwise.solve import solve"),
        ("layerwise/problem.py", "from layerwise import solve"),
        ("layerwise/problem.py", "from layerwise import prune_model"),
        ("layerwise/problem.py", "def f():\n    import transformers.models"),
        ("layerwise/evaluate.py", "import cvxpy"),
        ("layerwise/solve.py", "from layerwise.run.prune import prune_model"),
        ("layerwise/solve.py", "import pydantic"),
        ("solvers/fista.py", "from layerwise import adapters"),
        ("solvers/fista.py", "from layerwise import solve"),
        ("solvers/fista.py", "from . import lasso"),
        ("solvers/refit/rounds.py", "from layerwise.solve import solve"),
        ("adapters/opt.py", "import layerwise.solvers.wanda"),
        ("adapters/opt.py", "from layerwise.run import pipeline"),
        ("layerwise/run/checkpoints/storage.py", "from layerwise.run.models import native"),
        ("layerwise/run/activations/block.py", "from layerwise.run.pipeline import task"),
        ("layerwise/run/models/cuts.py", "import layerwise.run.pipeline.walk"),
        ("layerwise/run/pipeline/walk.py", "from layerwise.run.channels import removal"),
        ("layerwise/run/channels/sites.py", "from layerwise.run.outputs import recipe"),
        ("layerwise/run/outputs/recipe.py", "from layerwise.run.settings import Settings"),
        ("layerwise/run/settings.py", "from layerwise.run.prune import prune"),
        ("layerwise/run/prune.py", "from layerwise import cli"),
        ("layerwise/run/prune.py", "from layerwise.planning import plan"),
        ("layerwise/run/prune.py", "import typer"),
        ("layerwise/run/workers/pool.py", "from layerwise.run.checkpoints import atomic"),
        ("layerwise/grams/sweep.py", "from layerwise.reports import tables"),
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
