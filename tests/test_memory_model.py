"""The memory model: sums by hand, how they grow, and the costs of methods as counted."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.evaluate import relative_error
from layerwise.moments import Moments
from layerwise.patterns import Unstructured
from layerwise.planning import solver_costs
from layerwise.planning.dry import LiveBytes
from layerwise.planning.memory_model import Memory, memory_of
from layerwise.planning.scaling import LLAMAS, tables
from layerwise.planning.shapes import BlockShape, ModelShape, RunShape, StageShape
from layerwise.planning.solver_costs import COSTS, POSED, cost_of, workspace_of
from layerwise.planning.workspace import Peak, Workspace
from layerwise.problem import LayerProblem
from layerwise.solve import chain, resolve, solve
from layerwise.solvers import SOLVERS
from layerwise.solvers.fista import Fista
from layerwise.solvers.sparsegpt import SparseGPT
from layerwise.timing.operations import OperationCount
from layerwise.timing.random_layers import random_gram, random_weight

ROOT = Path(__file__).parents[1]
GIB = 1 << 30

ATTENTION, MLP = StageShape(100, (100, 50)), StageShape(300, (100,))
MODEL = ModelShape(
    blocks=(BlockShape(50_000, (ATTENTION, MLP)),) * 3,
    embeddings=20_000,
    head=10_000,
    largest=15_000,
    hidden=100,
    itemsize=2,
    working=((10, 10_000.0),),
)
RUN = RunShape(n_sequences=16, length=32, error_correction="block", base=7_000_000)
STREAM = 16 * 32 * 100 * 2


def items_of(memory: Memory, moment: str) -> dict[str, int]:
    found = next(m for m in memory.instants if m.name == moment)
    return {item.name: item.bytes for item in found.items}


def test_the_problem_of_a_matrix_by_hand() -> None:
    workspace = Workspace((Peak(2.0, 1.0), Peak(rows=1.0)))
    memory = memory_of(MODEL, replace(RUN, workspace=workspace))
    assert items_of(memory, "problem of a matrix") == {
        "Python, PyTorch, transformers": 7_000_000,
        "block": 100_000,
        "2 x hidden states": 2 * STREAM,
        "pruned weights and masks of the block": 3 * (100 * 150 + 300 * 100),
        "gram and cross-gram": 2 * 8 * 300**2,
        "workspace of the solver": 8 * (2 * 100 * 300 + 300**2),
        "what the C library keeps for later": 0.3 * 8 * (2 * 100 * 300 + 3 * 300**2),
    }


def test_large_arrays_go_back_to_the_system() -> None:
    """2896^2 float32 numbers are just below 32 MiB."""
    run = replace(RUN, workspace=Workspace((Peak(1.0),)))
    for rows, kept in ((2896, True), (2897, False)):
        stages = (StageShape(2896, (rows,)),)
        memory = memory_of(replace(MODEL, blocks=(BlockShape(10, stages),)), run)
        names = items_of(memory, "problem of a matrix")
        assert ("what the C library keeps for later" in names) == kept


def test_the_capture_by_hand() -> None:
    """The output head is not loaded: nothing after the blocks is computed."""
    found = items_of(memory_of(MODEL, RUN), "capture of the embeddings")
    assert found == {
        "Python, PyTorch, transformers": 7_000_000,
        "embeddings and norms": 2 * 20_000,
        "first block": 2 * 50_000,
        "hidden states": STREAM,
    }


def test_the_check_by_hand() -> None:
    found = items_of(memory_of(MODEL, RUN), "check of the checkpoint")
    assert found["a look at the largest tensor"] == 15_000 * (2 + 2)


def test_inputs_of_stages_leave_one_by_one() -> None:
    """Two stages: while the first is summed both are in memory, at the end none."""
    memory = memory_of(replace(MODEL, blocks=(BlockShape(10, (MLP, ATTENTION)),)), RUN)
    inputs = [
        items_of(memory, name).get("inputs of the stages that are left", 0)
        for name in (
            *("pass that keeps inputs", "sums over the inputs of a stage"),
            "problem of a matrix",
        )
    ]
    stored = 16 * 32 * 2
    assert inputs == [400 * stored, 400 * stored, 100 * stored]


def test_a_block_is_copied_where_its_inputs_are_not_kept() -> None:
    for tokens, copies in ((32, 0), (1 << 22, 2)):
        memory = memory_of(MODEL, replace(RUN, length=tokens))
        names = [item.name for moment in memory.instants for item in moment.items]
        assert names.count("copy of the block for the dense side") == copies


def test_what_is_settled_stays_until_the_block_is_done() -> None:
    """Pruned inputs of the stage that ends a module, then the outputs of the module."""
    name, stored = "outputs of modules that are settled", 16 * 32 * 2
    ending, last = StageShape(120, (70,), passes_through=True), StageShape(10, (1,))

    def settled(*stages: StageShape, mode: Any = "block") -> list[int]:
        model = replace(MODEL, blocks=(BlockShape(10, stages),))
        memory = memory_of(model, replace(RUN, error_correction=mode))
        moments = ("sums over the inputs of a stage", "problem of a matrix")
        return [items_of(memory, moment).get(name, 0) for moment in moments]

    wide = StageShape(900, (100,))  # its moment is the largest
    assert settled(ATTENTION, ending, wide) == [70 * stored, 70 * stored]
    assert settled(ATTENTION, replace(ending, width=1200), last) == [1200 * stored] * 2
    assert settled(ATTENTION, replace(ending, passes_through=False), wide) == [0, 0]
    assert settled(ending, wide) == [0, 0]  # both streams enter with the same inputs
    assert settled(ending, wide, mode="full") == [70 * stored, 70 * stored]
    assert settled(ATTENTION, ending, wide, mode="sequential") == [0, 0]


@pytest.mark.parametrize(
    ("rows", "grams"), [((100, 50), 3), ((50,), 2)], ids=["by gram", "by products"]
)
def test_a_drift_has_a_gram_where_outputs_are_many(
    rows: tuple[int, ...], grams: int
) -> None:
    stages = (StageShape(8, (1,)), StageShape(100, rows))
    memory = memory_of(replace(MODEL, blocks=(BlockShape(10, stages),)), RUN)
    found = items_of(memory, "problem of a matrix")
    sums = [size for name, size in found.items() if name.startswith("gram")]
    assert sums == [grams * 8 * 100**2]


def test_a_batch_is_added_while_the_pass_that_yields_it_is_alive() -> None:
    rows = 8 * 32
    update = 4 * (3 * rows + 512) * 300
    light = replace(MODEL, working=((16, 0.0), (48, 0.0)))
    heavy = replace(MODEL, working=((16, 300_000.0), (48, 1_000_000.0)))
    for model, working in ((light, 0), (heavy, 8 * 650_000)):
        found = items_of(memory_of(model, RUN), "sums over the inputs of a stage")
        assert found["a batch on its way through the block"] == update + working


@pytest.mark.parametrize(
    ("mode", "sums", "held"),
    [
        ("none", 8 * (100**2 + 300**2), 2),
        ("sequential", 8 * (100**2 + 300**2), 1),
        ("block", 2 * 8 * 300**2, 2),
        ("full", 2 * 8 * 300**2, 3),
    ],
)
def test_modes_of_error_correction(mode: str, sums: int, held: int) -> None:
    found = items_of(
        memory_of(MODEL, replace(RUN, error_correction=mode)), "problem of a matrix"
    )
    grams = [size for name, size in found.items() if name.startswith("gram")]
    states = [size for name, size in found.items() if name.endswith("hidden states")]
    assert grams == [sums]
    assert states == [held * STREAM]


def test_inputs_that_exceed_the_store_are_not_kept() -> None:
    """400 channels of 2 bytes: 1 GiB is reached between these two."""
    fits, too_many = GIB // 800 // 32, GIB // 800 // 32 + 1
    for count, kept in ((fits, True), (too_many, False)):
        memory = memory_of(MODEL, replace(RUN, n_sequences=count))
        names = [moment.name for moment in memory.instants]
        assert ("pass that keeps inputs" in names) == kept
        found = items_of(memory, "problem of a matrix")
        assert ("copy of the block for the dense side" in found) != kept


def test_on_the_disk_a_batch_of_hidden_states_is_left() -> None:
    found = items_of(memory_of(MODEL, replace(RUN, on_disk=True)), "problem of a matrix")
    assert found["2 x hidden states"] == STREAM  # 8 of the 16 sequences, twice


def test_every_worker_needs_all_of_it_and_the_driver_its_own() -> None:
    one, three = (memory_of(MODEL, replace(RUN, workers=n)) for n in (1, 3))
    driver = RUN.base + 2 * 50_000 + 2 * STREAM
    assert three.bytes("host") == 3 * one.bytes("host") + driver


def test_an_accelerator_takes_what_is_computed() -> None:
    run = replace(RUN, accelerator=True, workspace=Workspace((Peak(1.0),)))
    memory = memory_of(MODEL, run)
    moment = next(m for m in memory.instants if m.name == "problem of a matrix")
    on_host = {item.name for item in moment.items if item.kind == "host"}
    assert on_host == {
        *("Python, PyTorch, transformers", "libraries of the device"),
        *("2 x hidden states", "pruned weights and masks of the block"),
    }
    alone = memory_of(MODEL, replace(run, accelerator=False))
    same = next(m for m in alone.instants if m.name == "problem of a matrix")
    here = {item.name: item.bytes for item in moment.items}
    there = {item.name: item.bytes for item in same.items}
    assert set(here) - set(there) == {"libraries of the device", "context of the device"}
    assert set(there) - set(here) == {"what the C library keeps for later"}
    assert all(here[name] == size for name, size in there.items() if name in here)


def test_a_model_that_is_not_streamed_is_there_all_the_time() -> None:
    memory = memory_of(MODEL, replace(RUN, streamed=False))
    for moment in memory.instants:
        sizes = {item.name: item.bytes for item in moment.items}
        assert sizes["the whole model"] == 2 * (3 * 50_000 + 30_000)
        assert "block" not in sizes


def test_blocks_that_differ_count_with_the_largest() -> None:
    wide = replace(MODEL.blocks[0], stages=(ATTENTION, StageShape(700, (100,))))
    mixed = replace(MODEL, blocks=(*MODEL.blocks, wide, MODEL.blocks[0]))
    found = items_of(memory_of(mixed, RUN), "problem of a matrix")
    assert found["gram and cross-gram"] == 2 * 8 * 700**2
    assert mixed.widest == StageShape(700, (100,))


def _changed(run: RunShape, field: str, value: int) -> RunShape:
    changes: dict[str, Any] = {field: value}
    return replace(run, **changes)


@pytest.mark.parametrize("field", ["n_sequences", "length", "workers", "base"])
def test_more_of_anything_never_needs_less(field: str) -> None:
    """Searches for what would fit rely on it; below the store, which has a step down."""
    sizes = [
        memory_of(MODEL, _changed(RUN, field, value)).bytes("host")
        for value in (1, 2, 3, 5, 9, 20, 33, 100)
    ]
    assert sizes == sorted(sizes)


def test_a_workspace_is_its_largest_peak_and_rows_fit_the_budget() -> None:
    workspace = Workspace((Peak(1.0), Peak(0.0, 3.0)))
    assert workspace.bytes(1000, 10) == 8 * 1000 * 10
    assert workspace.bytes(10, 1000) == 8 * 3 * 1000**2
    rows = (1 << 20) // (16 * 8 * 100)
    only_rows = Workspace((Peak(rows=2.0),), budget=1 << 20)
    assert only_rows.bytes(1000, 100) == 8 * 2 * rows * 100
    many = Workspace((Peak(rows=2.0),))
    assert many.bytes(1000, 100) == 8 * 2 * 512 * 100
    assert many.bytes(1000, 100, accelerator=True) == 8 * 2 * 1000 * 100


def data_of(rows: int, width: int, *, pair: bool) -> tuple[Tensor, Moments, Tensor | None]:
    """Weight, moments in the units of a run that summed them up, and the drift."""
    device = torch.device("cpu")
    gram = random_gram(width, device, 1)
    weight = random_weight(rows, width, device, 0).bfloat16()
    if not pair:
        return weight, Moments(gram, n_tokens=4096, summed=True), None
    noise = 1 + 0.01 * torch.randn(width, dtype=torch.float64)
    drift = torch.full((rows,), 1e-2, dtype=torch.float64)
    return weight, Moments(gram, gram * noise, n_tokens=4096, summed=True), drift


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(
    ("method", "slack"),
    [("wanda", 0), ("ria+magnitude", 0), ("sparsegpt", 0.2), ("admm", 0.3)],
)
def test_costs_are_those_that_are_counted(method: str, slack: float, pair: bool) -> None:
    """Posed, solved and graded as a run does it; iterations depend on the layer."""
    rows, width = 1024, 256
    weight, moments, drift = data_of(rows, width, pair=pair)
    with LiveBytes() as live, OperationCount() as count:
        problem = LayerProblem.from_moments(
            weight, moments, pattern=Unstructured(0.5), drift=drift
        )
        found = solve(problem, method)
        stored = found.weight.to(weight.dtype)
        if not torch.equal(stored.to(found.weight.dtype), found.weight):
            relative_error(problem, stored)
    cost = cost_of(resolve(method), pair=pair)
    workspace = workspace_of(resolve(method), pair=pair)
    assert cost is not None
    assert workspace is not None
    work = cost.work(StageShape(width, (rows,)))
    for dtype in (torch.float32, torch.float64):
        counted = count.work.flops.get(dtype, 0.0)
        assert work.flops[dtype] == pytest.approx(counted, rel=slack), dtype
    assert workspace.bytes(rows, width) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("pair", [False, True])
def test_a_chain_is_posed_and_graded_once(pair: bool) -> None:
    both = cost_of(chain("wanda", "sparsegpt"), pair=pair)
    first, second = (cost_of(resolve(name), pair=pair) for name in ("wanda", "sparsegpt"))
    assert first is not None
    assert second is not None
    assert both is not None
    assert (first.single, first.double) == (0, 3 if pair else 2)  # problem, and grade
    assert both.double == second.double == first.double + 1  # of what is stored
    posed = POSED.of(pair=pair).traffic
    assert both.traffic == first.traffic + second.traffic - posed


def test_memory_of_a_chain_is_that_of_the_larger_step() -> None:
    workspace = workspace_of(chain("wanda", "sparsegpt"), pair=True)
    alone = [workspace_of(resolve(name), pair=True) for name in ("wanda", "sparsegpt")]
    assert workspace is not None
    assert workspace.bytes(300, 200) == max(w.bytes(300, 200) for w in alone if w)


@dataclass(frozen=True)
class Doubling:
    """A user's method with two products in float32 and three copies of the matrix."""

    name: str = "doubling"
    fails: bool = False

    def solve(self, problem: LayerProblem) -> Tensor:
        if self.fails:
            message = "no"
            raise RuntimeError(message)
        gram, weight = problem.gram.float(), problem.weight.float()
        copies = [weight @ gram, weight @ gram]
        return torch.where(problem.pattern.mask(weight), weight + 0 * copies[0], 0.0)


class Unhashable(Doubling):
    """The same, of a kind that cannot be remembered."""

    __hash__ = None  # type: ignore[assignment]


def test_a_method_without_figures_is_counted() -> None:
    cost, base = (cost_of(resolve(m), pair=False) for m in (Doubling(), "wanda"))
    assert cost is not None
    assert base is not None
    assert cost.single - base.single == pytest.approx(2, rel=0.05)
    assert cost.cubic == pytest.approx(0, abs=0.05)
    assert cost_of(resolve(Unhashable()), pair=False) == cost
    assert cost_of(resolve(Doubling(fails=True)), pair=False) is None


def test_options_that_change_the_cost_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(solver_costs, "_counted", lambda step: asked.append(step))
    assert {name.split()[0] for name in COSTS} <= set(SOLVERS)
    assert cost_of(Fista(max_rounds=3), pair=True) is None
    assert asked == [Fista(max_rounds=3)]
    assert cost_of(SparseGPT(block_size=64), pair=True) is not None
    assert cost_of(Fista(memory_budget=1 << 20), pair=True) is not None


def test_the_tables_of_the_page_are_those_of_the_model() -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for table in tables():
        assert table in page


def test_shapes_of_the_tables_are_those_of_the_models() -> None:
    """Parameters as the models are published with, to the nearest billion."""
    counts = [round(model.shape.parameters / 1e9) for model in LLAMAS]
    assert counts == [8, 71, 406]
