"""Users' own solvers in the fingerprint of a run: same object, same text, and no other."""

import importlib
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.errors import UsageError
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.solver_identity import ENTRY, UNKNOWN, own_solver
from layerwise.run.prune import prune_model
from layerwise.solve import chain, resolve
from layerwise.solvers.wanda import Wanda
from tests.support.models import random_tokens, save_checkpoint, tiny_model

# a module of a user; every variation below is another solver
MODULE = '''
import torch
from layerwise import solve

POWER = 2
NAMES = {"k_proj", "q_proj"}

def score(x, power=POWER):
    return (x.abs() ** power).sum()

class Base:
    def helper(self, x):
        return score(x) + 1

class Mine(Base):
    scale = 0.5

    def __init__(self, steps, **more):
        self.steps = steps
        self.__dict__.update(more)

    def solve(self, problem):
        """Magnitude."""
        limit = lambda x: x > 3.0
        if limit(self.helper(problem.weight)) and "q_proj" in NAMES:
            return solve(problem, "magnitude")
        return solve(problem, "wanda")
'''


def module(text: str = MODULE) -> Any:
    made = ModuleType("users_module")
    exec(compile(text, "users_module.py", "exec"), made.__dict__)
    return made


def entry(solver: Any) -> str:
    return own_solver(resolve(solver))[ENTRY]


CODE = {
    "constant of the module": ("POWER = 2", "POWER = 3"),
    "names of the module": ('{"k_proj"', '{"v_proj"'),
    "function of the module": (".sum()", ".mean()"),
    "default": ("power=POWER", "power=4"),
    "base": ("score(x) + 1", "score(x) + 2"),
    "constant of the class": ("scale = 0.5", "scale = 0.25"),
    "function inside": ("x > 3.0", "x < 3.0"),
    "another solver": ('"wanda"', '"sparsegpt"'),
    "another name": ("class Mine", "class Yours"),
}


@pytest.mark.parametrize(("old", "new"), CODE.values(), ids=list(CODE))
def test_code_counts(old: str, new: str) -> None:
    assert old in MODULE
    other = module(MODULE.replace(old, new))
    kind = getattr(other, "Yours", None) or other.Mine
    assert entry(kind(3)) != entry(module().Mine(3))


def test_comments_and_lines_do_not_count() -> None:
    text = "# a comment\n\n" + MODULE.replace("return solve", "return solve  # sure\\\n")
    text = text.replace("  # sure\\\n", "")
    assert entry(module(text).Mine(3)) == entry(module().Mine(3))


ATTRIBUTES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "number": lambda: (3, 50),
    "type of a number": lambda: (1, True),
    "none": lambda: (None, "None"),
    "list": lambda: ([1, 2], [2, 1]),
    "nested": lambda: ({"a": [1, {2}]}, {"a": [1, {3}]}),
    "tensor": lambda: (torch.zeros(3), torch.ones(3)),
    "shape": lambda: (torch.zeros(2, 3), torch.zeros(3, 2)),
    "array": lambda: (np.arange(5000), np.arange(5000)[::-1]),
    "path": lambda: (Path("a"), Path("b")),
    "object": lambda: (module().Mine(1), module().Mine(2)),
    "lambda": lambda: (lambda x: x + 1, lambda x: x + 2),
    "closure": lambda: (scaled(1), scaled(2)),
    "partial": lambda: (partial(max, 1), partial(max, 2)),
    "method": lambda: (module().Mine(1).helper, module().Mine(2).helper),
    "built in": lambda: (max, min),
    "class": lambda: (Wanda, dict),
    "generator of Python": lambda: (random.Random(1), random.Random(2)),
    "layer": lambda: (layer(1.0), layer(2.0)),
}


def scaled(factor: int) -> Callable[[int], int]:
    return lambda x: factor * x


def layer(value: float) -> torch.nn.Linear:
    made = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(made.weight, value)
    torch.nn.init.zeros_(made.bias)
    return made


@pytest.mark.parametrize("make", ATTRIBUTES.values(), ids=list(ATTRIBUTES))
def test_attributes_count(make: Callable[[], tuple[Any, Any]]) -> None:
    mine = module().Mine
    one, two = (entry(mine(3, extra=value)) for value in make())
    assert one != two
    assert UNKNOWN not in (one, two)
    assert one == entry(mine(3, extra=make()[0]))


def test_an_object_that_holds_itself() -> None:
    solver, other = module().Mine(3), module().Mine(4)
    solver.me, other.me = solver, other
    assert entry(solver) != entry(other)


@pytest.mark.parametrize(
    "value",
    [torch.Generator(), iter([1]), object()],
    ids=lambda value: type(value).__name__,
)
def test_what_nothing_describes_is_unknown(value: Any) -> None:
    assert entry(module().Mine(3, extra=value)) == UNKNOWN
    assert entry(module().Mine(3, extra=value, fingerprint="seed 3")) != UNKNOWN


def test_a_fingerprint_counts_instead() -> None:
    def given(text: Any, steps: int = 3) -> str:
        return entry(module().Mine(steps, fingerprint=text))

    assert given("a", 3) == given("a", 4) == given(lambda: "a")
    assert given("a") != given("b")
    for wrong in (3, "", lambda: None):
        with pytest.raises(UsageError, match="the fingerprint of Mine is"):
            given(wrong)


def test_only_objects_of_users_have_an_entry() -> None:
    assert own_solver(resolve("wanda+swaps")) == {}
    assert own_solver(Wanda()) == {}
    first, second = module().Mine(1), module().Mine(2)
    chains = [chain("wanda", first), chain("wanda", second), chain(first, "swaps")]
    assert len({entry(one) for one in chains[:2]}) == 2

    @dataclass(frozen=True)
    class MyWanda(Wanda):
        """One that a user derived."""

    assert entry(MyWanda()) != UNKNOWN


def test_another_process_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    names = set("abcdefgh")
    here = entry(importlib.import_module("users_module").Mine(3, names=names))
    script = (
        f"import sys; sys.path = {sys.path!r}\n"
        "from users_module import Mine\n"
        "from layerwise.run.pipeline.solver_identity import own_solver\n"
        "from layerwise.solve import resolve\n"
        "print(*own_solver(resolve(Mine(3, names=set('abcdefgh')))).values())"
    )
    there = subprocess.run(  # which reads the compiled file, and orders sets otherwise
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here != UNKNOWN


def test_a_run_is_not_continued_with_another_configuration(tmp_path: Path) -> None:
    class Stop(Exception): ...

    class Callback:
        def on_start(self, n_layers: int) -> None: ...

        def on_layer(self, record: Any) -> None:
            if ".1." in record.name:
                raise Stop

        def on_finish(self, report: Any) -> None: ...

    source = save_checkpoint(tmp_path / "model", tiny_model("llama"))

    def prune(solver: Any, **options: Any) -> None:
        data: Any = {"n_sequences": 4, "sequence_length": 12}
        tokens = random_tokens(4, 12)
        place: Any = {"output_dir": tmp_path / "out"}
        prune_model(source, solver, 0.5, calibration=tokens, **place, **data, **options)

    mine = module().Mine
    with pytest.raises(Stop):
        prune(mine(3), callbacks=[Callback()])
    with pytest.raises(UsageError, match="with another state or code of the solver"):
        prune(mine(50))
    prune(mine(3))
    assert all(check.holds for check in verify(tmp_path / "out"))
