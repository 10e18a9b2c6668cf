"""A race of solvers: counted work, layers from files and sizes, the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layerwise.cli import run
from layerwise.errors import DataError, InvalidProblemError, UsageError
from layerwise.grams.layer_files import read_layers
from layerwise.patterns import Unstructured
from layerwise.reports.curves import draw_race
from layerwise.solve import solve
from layerwise.timing import random_layers
from layerwise.timing.operations import OperationCount
from layerwise.timing.race import Lap, Race, race
from tests.support.problems import make_layer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.timing.floor.GEMM_SIZE", {"cpu": 16})
    monkeypatch.setattr("layerwise.timing.floor.COPY_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr("layerwise.timing.floor.LEAST_SECONDS", 0.0)


# --- counted work ----------------------------------------------------------------------


def double(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def test_products_by_hand() -> None:
    a, b, c = torch.ones(2, 3), torch.ones(3, 5), torch.ones(2, 5)
    with OperationCount() as count:
        torch.mm(a, b)
    assert count.work.flops == {torch.float32: 2 * 2 * 3 * 5}
    assert count.work.bytes == 4 * (6 + 15 + 10)
    with OperationCount() as count:
        torch.mm(a, b, out=c)  # what is overwritten is not read
    assert count.work.bytes == 4 * (6 + 15 + 10)
    with OperationCount() as count:
        torch.addmm(c, a, b)
        c.addmm_(a, b)
        torch.bmm(double(7, 2, 3), double(7, 3, 5))
    assert count.work.flops == {torch.float32: 120, torch.float64: 7 * 60}


def test_factorizations_by_hand() -> None:
    matrix, sides = torch.eye(6).repeat(4, 1, 1), torch.ones(4, 6, 2)
    with OperationCount() as count:
        lower = torch.linalg.cholesky(matrix)
    assert count.work.flops == {torch.float32: pytest.approx(4 * 6**3 / 3)}
    with OperationCount() as count:
        torch.cholesky_solve(sides, lower)
    assert count.work.flops == {torch.float32: 4 * 2 * 6**2 * 2}
    with OperationCount() as count:
        torch.linalg.solve_triangular(lower, sides, upper=False)
    assert count.work.flops == {torch.float32: 4 * 6**2 * 2}
    with OperationCount() as count:
        torch.cholesky_inverse(lower)
    assert count.work.flops == {torch.float32: pytest.approx(4 * 2 * 6**3 / 3)}


def test_views_and_empty_memory_cost_nothing() -> None:
    with OperationCount() as count:
        torch.empty(9, 9).T[2:].reshape(-1)[:3].view(3, 1)
    assert count.work.bytes == 4 * 2 * 7 * 9  # the one copy of a transposed matrix
    torch.add(torch.ones(3), 1)  # outside
    assert count.work.bytes == 4 * 2 * 7 * 9


# --- layers ----------------------------------------------------------------------------


def test_layers_of_sizes() -> None:
    small, wide = random_layers.layers_of_sizes("3x4, 5x40", CPU, 0)
    assert [small.weight.shape, wide.weight.shape] == [(3, 4), (5, 40)]
    values = torch.linalg.eigvalsh(wide.moments.gram)
    assert float(values.sum()) == pytest.approx(40)
    assert values[-1] > 5 * values.median()
    for text in ("", "3", "3x", "0x4", "3x4x5", "a"):
        with pytest.raises(UsageError, match="sizes such as"):
            random_layers.layers_of_sizes(text, CPU, 0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            "llama-3-8b",
            [
                *(("q", 4096, 4096), ("k", 1024, 4096), ("v", 1024, 4096)),
                *(("o", 4096, 4096), ("gate", 14336, 4096), ("up", 14336, 4096)),
                ("down", 4096, 14336),
            ],
        ),
        (
            "opt-125m",
            [
                *((name, 768, 768) for name in ("q", "k", "v", "out")),
                *(("fc1", 3072, 768), ("fc2", 768, 3072)),
            ],
        ),
    ],
)
def test_matrices_of_a_block(shape: str, expected: list[Any]) -> None:
    found = {
        (name.split(".")[-1].removesuffix("_proj"), rows, width)
        for stage in random_layers._stages(shape)
        for name, rows, width in stage
    }
    assert found == set(expected)


def test_layers_of_a_shape_share_grams(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [[("q", 3, 4), ("k", 2, 4)], [("o", 4, 6)]]
    monkeypatch.setattr(random_layers, "_stages", lambda shape: stages)
    q, k, o = random_layers.layers_of_shape("opt-125m", CPU, 0)
    assert q.moments.gram.data_ptr() == k.moments.gram.data_ptr()
    assert (k.weight.shape, o.weight.shape) == ((2, 4), (4, 6))
    with pytest.raises(UsageError, match="unknown shape 'opt'"):
        random_layers.layers_of_shape("opt", CPU, 0)


def tensors(drift: float = 0.0) -> dict[str, Tensor]:
    problem = make_layer(1, rows=6, width=8, tokens=40, drift=drift).problem(
        Unstructured(0.5)
    )
    found = {"weight": problem.weight, "gram": problem.gram.clone()}
    if drift:
        found |= {"cross_gram": problem.cross_gram, "energy": problem.energy}
    return found


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_stored_layers(drift: float, tmp_path: Path) -> None:
    """A stored layer is the problem that was stored."""
    save_file(tensors(drift), tmp_path / "b.safetensors")
    named = {f"layers.{n}.q.{k}": v.clone() for n in "12" for k, v in tensors().items()}
    save_file(named, tmp_path / "a.safetensors")
    found = list(read_layers(tmp_path))
    assert [layer.name for layer in found] == ["layers.1.q", "layers.2.q", "b"]
    expected = make_layer(1, rows=6, width=8, tokens=40, drift=drift).problem(
        Unstructured(0.5)
    )
    (alone,) = read_layers(tmp_path / "b.safetensors")
    for name in ("wanda", "sparsegpt"):
        one, other = (solve(p, name) for p in (expected, alone.problem(Unstructured(0.5))))
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gram": None}, "has no gram of layer 'bad'"),
        ({"weight": None}, "has no weight of layer 'bad'"),
        ({"cross_gram": torch.eye(8)}, "has no energy"),
        ({"mask": torch.ones(2)}, "holds 'mask'"),
        ({"gram": torch.ones(8, 8, dtype=torch.int64)}, "type I64"),
        ({"gram": None, "weight": None}, "holds no layer"),
    ],
)
def test_files_that_are_no_layers(
    changes: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    content = {k: v for k, v in (tensors() | changes).items() if v is not None}
    save_file(content, tmp_path / "bad.safetensors")
    with pytest.raises(DataError, match=words):
        read_layers(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no safetensors file"):
        read_layers(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_layers(tmp_path / "none.safetensors")
    save_file(tensors() | {"gram": torch.eye(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(InvalidProblemError):
        next(read_layers(tmp_path)).problem(Unstructured(0.5))


# --- the race --------------------------------------------------------------------------


def test_a_race() -> None:
    methods = "wanda, wanda+least-squares,swaps"
    found = race(methods, layers="16x24,8x32", gap=True, device="cpu")
    names = ["wanda", "wanda+least-squares", "swaps"]
    assert [(lap.layer, lap.method) for lap in found.laps] == [
        (layer, name) for layer in ("16x24", "8x32") for name in names
    ]
    layers = random_layers.layers_of_sizes("16x24,8x32", CPU, 0)
    for index, layer in enumerate(layers):
        problem = layer.problem(Unstructured(0.5))
        for lap in found.laps[3 * index : 3 * index + 3]:
            expected = solve(problem, lap.method)
            assert lap.relative_error == expected.relative_error
            assert lap.iterations == expected.iterations
            assert lap.curve[-1] == (lap.seconds, lap.relative_error)
            assert lap.gap is not None
            assert 0 <= lap.gap <= 1
            share = sum(count / found.gemm_rates[name] for name, count in lap.flops.items())
            assert lap.matmul_share == pytest.approx(share / lap.seconds)
            traffic = lap.bytes / found.copy_rate
            assert lap.bandwidth_share == pytest.approx(traffic / lap.seconds)
        wanda, refit, swaps = found.laps[3 * index : 3 * index + 3]
        assert wanda.certificate is None
        assert refit.certificate is not None
        assert refit.certificate["kind"] == "refit"
        assert refit.certificate["bound"] <= 1e-8
        assert wanda.gap > refit.gap > swaps.gap  # type: ignore[operator]
        assert refit.flops["float32"] > 0
        assert len(wanda.curve) == 1
        seconds, errors = zip(*swaps.curve, strict=True)
        assert len(errors) > 2
        assert list(seconds) == sorted(seconds)
        assert errors[0] > errors[-1]


def test_every_run_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method must not profit from what the one before it factored."""
    seen = []

    def spy(problem: Any, solver: Any, **options: Any) -> Any:
        seen.append(len(problem.moments._shared))
        return solve(problem, solver, **options)

    monkeypatch.setattr("layerwise.timing.race.solve", spy)
    race("sparsegpt,sparsegpt", layers="8x8", device="cpu")
    assert seen == [0, 0, 0, 0]


def test_races_that_cannot_be_run() -> None:
    for given in ({}, {"layers": "4x4", "shape": "opt-125m"}):
        with pytest.raises(UsageError, match="one of the three"):
            race("wanda", **given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="did you mean wanda"):
        race("wnada", layers="4x4")
    with pytest.raises(InvalidProblemError, match="for a fixed mask"):
        race("wanda,least-squares", layers="4x4")
    with pytest.raises(UsageError, match="gblm needs the gradient"):
        race("wanda,gblm", layers="4x4")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(tensors(), tmp_path / "layer.safetensors")
    out, picture = tmp_path / "race.json", tmp_path / "race.svg"
    arguments = ["bench", "--grams", str(tmp_path), "--methods", "wanda,swaps"]
    arguments += ["--sparsity", "2:4", "--damping", "0.1", "--device", "cpu", "--gap"]
    assert run([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert "2:4, damping 0.1" in found["title"]
    for lap in found["laps"]:
        assert lap["layer"] == "layer"
        assert f"{lap['relative_error']:.4f}" in printed
        assert f"{lap['gap']:.1%}" in printed
    drawn = picture.read_text()
    assert all(word in drawn for word in ("seconds", "relative error", "wanda", "swaps"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["folder", "--methods", "wanda"], "MODEL does not go with --methods"),
        (["--methods", "wanda", "--n-sequences", "2"], "--n-sequences does not go"),
        (["--shape", "opt-125m", "--damping", "1"], "--damping needs --methods"),
        (["--shape", "opt-125m", "--gap"], "--gap needs --methods"),
        (["--layers", "3x3", "--methods", "wanda", "--plot", "a.txt"], "got 'a.txt'"),
    ],
)
def test_flags_of_the_other_bench(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_picture_of_nothing_drawable(tmp_path: Path) -> None:
    """An exact answer has no place on a logarithmic axis; the picture is still drawn."""
    lap = Lap(
        *("layer", 1, 1, "wanda", 1.0, 0, 0.0, "feasible", None, None, {}, 0.0),
        *(0.0, 0.0, ((1.0, 0.0),)),
    )
    draw_race(Race("none", "cpu", 1, {}, 1.0, (lap,)), tmp_path / "race.svg")
    assert "relative error" in (tmp_path / "race.svg").read_text()
    with pytest.raises(DataError, match="cannot write"):
        draw_race(Race("none", "cpu", 1, {}, 1.0, (lap,)), tmp_path / "no" / "race.svg")
