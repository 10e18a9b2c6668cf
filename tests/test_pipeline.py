"""Pipeline: the problem of every layer, rebuilt by hand from hooked copies of the model."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.adapters import Stage, get_adapter
from layerwise.errors import InvalidProblemError, SolveError
from layerwise.moments import even_exponent
from layerwise.problem import LayerProblem
from layerwise.run import capacity
from layerwise.run.activations import dense_side
from layerwise.run.activations.streams import BATCH
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from layerwise.run.prune import prune_model
from layerwise.run.report import PruneReport
from layerwise.solution import Solution
from layerwise.solve import solve
from tests.support.models import (
    INNER,
    WIDTH,
    blocks_of,
    random_tokens,
    recorded_inputs,
    tiny_model,
    weight_of,
)
from tests.support.pruning import prune_and_record
from tests.support.tolerances import MOMENTS, RECORDED_ERROR

LENGTH = 12
TOKENS = random_tokens(BATCH + 3, LENGTH)  # two batches of unequal size
N_TOKENS = TOKENS.numel()


@dataclass(frozen=True)
class Run:
    """A pruned model, its dense original, and the problems that were posed."""

    dense: Any
    report: PruneReport
    problems: dict[str, LayerProblem]


def prune(
    monkeypatch: pytest.MonkeyPatch,
    mode: Any,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    method: Any = "sparsegpt",
    damage: Callable[[Any], None] = lambda model: None,
    **options: Any,
) -> Run:
    model = tiny_model(family, layers=3, dtype=dtype)
    damage(model)
    dense = copy.deepcopy(model)
    report, problems = prune_and_record(
        monkeypatch,
        model,
        method=method,
        calibration=TOKENS,
        error_correction=mode,
        **options,
    )
    return Run(dense, report, problems)


def inputs_of(model: Any, name: str) -> Tensor:
    """Inputs of a linear in float64, shape (in, tokens)."""
    with torch.no_grad(), recorded_inputs(model, [name]) as seen:
        for batch in torch.split(TOKENS, BATCH):
            model(batch, use_cache=False)
    flat = [batch.double().reshape(-1, batch.shape[-1]) for batch in seen[name]]
    return torch.cat(flat).T


def mixture(run: Run, is_pruned: Callable[[str], bool]) -> Any:
    """Return the dense model with some of its linears replaced by the pruned ones."""
    model = copy.deepcopy(run.dense)
    for record in run.report.records:
        if is_pruned(record.name):
            source = run.report.model.get_submodule(record.name)
            model.get_submodule(record.name).load_state_dict(source.state_dict())
    return model


def block_and_stage(name: str) -> tuple[int, int]:
    _, _, index, linear = name.split(".", 3)
    stages = get_adapter("llama").stages
    return int(index), [linear in stage.linears for stage in stages].index(True)


def models_of(run: Run, mode: str, name: str) -> tuple[Any, Any]:
    """Models that X and Xhat of a layer come from, as docs/problem.md defines the modes."""
    block, stage = block_and_stage(name)

    def earlier_block(other: str) -> bool:
        return block_and_stage(other)[0] < block

    def earlier_stage(other: str) -> bool:
        index, position = block_and_stage(other)
        return index == block and position < stage

    if mode == "none":
        return run.dense, run.dense
    if mode == "sequential":
        behind = mixture(run, earlier_block)
        return behind, behind
    if mode == "block":
        return run.dense, mixture(run, earlier_stage)
    return run.dense, mixture(run, lambda o: earlier_block(o) or earlier_stage(o))


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_moments_are_those_of_the_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prune(monkeypatch, mode)
    assert len(run.problems) == 3 * 7
    rounding = MOMENTS[torch.float64]
    for name, problem in run.problems.items():
        dense, pruned = models_of(run, mode, name)
        inputs, seen = inputs_of(dense, name), inputs_of(pruned, name)
        assert problem.moments.n_tokens == N_TOKENS
        gram = seen @ seen.T / N_TOKENS
        scale = 2.0 ** -even_exponent(float(gram.diagonal().mean()))
        assert close(problem.gram, gram * scale, rounding), name
        assert close(problem.cross_gram, inputs @ seen.T / N_TOKENS * scale, rounding), name
        outputs = weight_of(run.dense, name) @ inputs
        energy = outputs.square().sum(dim=1) / N_TOKENS * scale
        assert close(problem.energy, energy, rounding), name
        assert torch.equal(problem.weight, weight_of(run.dense, name))


def test_the_four_modes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would not notice modes that are all the same."""
    last = "model.layers.2.mlp.down_proj"
    runs = [prune(monkeypatch, mode) for mode in ERROR_CORRECTIONS]
    weights = [weight_of(run.report.model, last) for run in runs]
    for i, weight in enumerate(weights):
        assert not any(torch.equal(weight, other) for other in weights[:i])


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_linears_with_the_same_inputs_share_their_moments(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prune(monkeypatch, mode)
    for index in range(3):
        found = [
            {
                id(run.problems[f"model.layers.{index}.{name}"].moments)
                for name in stage.linears
            }
            for stage in get_adapter("llama").stages
        ]
        assert all(len(moments) == 1 for moments in found)
        assert len(set.union(*found)) == len(found)


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_layers_are_pruned_in_the_order_of_the_data_flow(
    family: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prune(monkeypatch, mode, family=family, method="magnitude")
    adapter = get_adapter(family)
    blocks = adapter.blocks_of(run.dense)
    expected = [
        f"{block}.{name}" for block in blocks for name in adapter.linear_names(block)
    ]
    assert [record.name for record in run.report.records] == expected


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_recorded_error_is_that_of_the_stored_weights(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prune(monkeypatch, mode, dtype=torch.bfloat16)
    rounding_matters = False
    for record in run.report.records:
        dense, pruned = models_of(run, mode, record.name)
        stored = weight_of(run.report.model, record.name)
        assert stored.dtype == torch.bfloat16
        weight = weight_of(run.dense, record.name)
        outputs = weight.double() @ inputs_of(dense, record.name)
        error = outputs - stored.double() @ inputs_of(pruned, record.name)
        expected = float(error.norm() / outputs.norm())
        assert record.relative_error == pytest.approx(expected, rel=RECORDED_ERROR)
        unrounded = solve(run.problems[record.name], "sparsegpt").relative_error
        rounding_matters |= unrounded != pytest.approx(expected, rel=RECORDED_ERROR)
    assert rounding_matters


def test_record_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    run = prune(monkeypatch, "block", method="wanda+least-squares", damping=0.03)
    for record in run.report.records:
        problem = run.problems[record.name]
        weight = weight_of(run.report.model, record.name)
        assert record.shape == tuple(weight.shape)
        assert record.method == "wanda+least-squares"
        assert record.sparsity == float((weight == 0).double().mean())
        assert record.pattern == "0.5"
        assert (record.damping, record.damping_raised) == (0.03, False)
        assert record.rank == int(torch.linalg.matrix_rank(problem.gram))
        assert record.n_tokens == N_TOKENS
        assert (record.status, record.certificate_kind) == ("feasible", "refit")
        assert record.certificate is not None
        assert record.seconds > 0


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_activation_that_is_not_finite_names_the_layer(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(model: Any) -> None:
        model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")

    with pytest.raises(InvalidProblemError) as caught:
        prune(monkeypatch, mode, method="magnitude", damage=damage)
    message = str(caught.value)
    assert message.startswith("model.layers.1.mlp.gate_proj: inputs contain nan at token 0")
    assert "channel 3" in message
    assert "\n" not in message


def test_failure_of_a_solver_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class NeverFinite:
        name = "never-finite"

        def solve(self, problem: LayerProblem) -> Any:
            solution = solve(problem, "magnitude")
            if problem.shape == (INNER, WIDTH):
                solution.weight.fill_(float("nan"))
            return solution

    with pytest.raises(SolveError, match=r"^model\.layers\.0\.mlp\.gate_proj: never"):
        prune(monkeypatch, "block", method=NeverFinite())


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_only_targets_change(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = r"re:.*\.1\..*(v_proj|down_proj)"
    run = prune(monkeypatch, mode, method="magnitude", targets=pattern)
    chosen = {"model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"}
    assert set(run.problems) == chosen
    after = dict(run.report.model.named_parameters())
    for name, before in run.dense.named_parameters():
        touched = name.removesuffix(".weight") in chosen
        assert torch.equal(before, after[name]) != touched


def test_blocks_with_nothing_to_prune_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first target of the last block sees dense inputs if nothing precedes it."""
    run = prune(monkeypatch, "full", targets=r"re:.*\.2\..*q_proj")
    (problem,) = run.problems.values()
    seen = inputs_of(run.dense, "model.layers.2.self_attn.q_proj")
    gram = seen @ seen.T / N_TOKENS
    assert close(problem.gram, gram, MOMENTS[torch.float64])
    assert close(problem.cross_gram, gram, MOMENTS[torch.float64])


def test_the_model_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = prune(monkeypatch, "block", method="magnitude")
    model = run.report.model
    assert not model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all("forward" not in vars(block) for block in blocks_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dense_inputs_come_from_one_pass_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, passes = [], []
    for store in (0, capacity.STORE):
        asked: list[str] = []

        original = dense_side.inputs_of

        def count(*args: Any, asked: list[str] = asked, run: Any = original) -> Any:
            asked.append(args[3].linears[0])
            return run(*args)

        with monkeypatch.context() as patch:
            patch.setattr(dense_side, "inputs_of", count)
            patch.setattr(capacity, "STORE", store)
            model = tiny_model("llama", layers=2)
            report = prune_model(
                model,
                "sparsegpt",
                sparsity=0.3,
                calibration=TOKENS,
                n_sequences=len(TOKENS),
                sequence_length=LENGTH,
            )
        weights.append(report.model.state_dict())
        passes.append(len(asked))
    assert passes == [2 * 4, 0]  # blocks times stages
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_stored_inputs_are_gone_when_their_stage_is_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    ask = dense_side.DenseSide.inputs_of

    def asked(side: dense_side.DenseSide, stage: Stage) -> list[Tensor]:
        batches = list(ask(side, stage))
        given[:] = [weakref.ref(batch) for batch in batches]
        return batches

    def solving(problem: LayerProblem, solver: Any) -> Solution:
        alive.append(any(batch() is not None for batch in given))
        return solve(problem, solver)

    monkeypatch.setattr(dense_side.DenseSide, "inputs_of", asked)
    monkeypatch.setattr("layerwise.run.pipeline.matrix.solve", solving)
    prune_model(
        tiny_model("llama", layers=2),
        "wanda",
        sparsity=0.5,
        calibration=TOKENS,
        n_sequences=len(TOKENS),
        sequence_length=LENGTH,
    )
    assert given
    assert alive == [False] * 2 * 7


def test_stored_inputs_are_those_that_the_linear_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block that continues in place after its linears."""

    def shrink(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        args[0].mul_(0.5)

    results = []
    for store in (0, capacity.STORE):
        model = tiny_model("llama", layers=1)
        for name in ("self_attn.q_proj", "mlp.gate_proj"):
            model.model.layers[0].get_submodule(name).register_forward_hook(shrink)
        with monkeypatch.context() as patch:
            patch.setattr(capacity, "STORE", store)
            report = prune_model(
                model,
                "wanda",
                sparsity=0.5,
                calibration=TOKENS,
                n_sequences=len(TOKENS),
                sequence_length=LENGTH,
            )
        results.append([record.relative_error for record in report.records])
    assert results[0] == results[1]
