"""Benchmark commands: they go on where they stopped, and their tables hide nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.demo import MODELS, model_path
from layerwise.experiments.demo import all_methods
from layerwise.experiments.experiment import DENSE, Experiment
from layerwise.experiments.results import ResultStore
from layerwise.problem import LayerProblem
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from layerwise.solve import solve
from tests.benchmarks import alps_race, captured, held_out, perplexity_grid, refit_race
from tests.benchmarks.captured import CapturedLayer
from tests.benchmarks.perplexity_grid import Results, canonical, complete, experiments

METHODS = ("magnitude", "wanda", "least-squares")
LLAMA = Experiment("llama", "wanda", "0.5", "none", 0)


# --- perplexity grid ---------------------------------------------------------------------


def rows(lines: Sequence[str], method: str) -> list[list[str]]:
    """Cells of the rows of a method, table by table."""
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row[1:] for row in found if row and row[0] == method]


def fake(missing: Sequence[Experiment]) -> Results:
    """Perplexity 20 plus the seed; what needs a mask is refused."""
    for asked in missing:
        if asked.method == "least-squares":
            yield asked, {"refused": "it needs a mask"}
        else:
            yield asked, {"perplexity": 20.0 + asked.seed, "seconds": 1.0}


def test_every_experiment_is_asked_once() -> None:
    asked = experiments(METHODS)
    assert len(set(asked)) == len(asked)
    assert sum(e.method == DENSE for e in asked) == 3
    # two methods that read inputs: 3 patterns, 4 corrections, 3 seeds; 2 models, 2 patterns
    assert sum(e.method in ("wanda", "least-squares") for e in asked) == 2 * (36 + 4)
    # magnitude reads none: once per model and pattern
    assert sum(e.method == "magnitude" for e in asked) == 3 + 4


def test_methods_that_read_inputs_stand_for_themselves() -> None:
    for method in all_methods():
        asked = Experiment("llama", method, "0.5", "none", 2)
        assert (canonical(asked) == asked) is (method != "magnitude")


def test_grid_goes_on_and_shows_everything(tmp_path: Path) -> None:
    path = tmp_path / "grid.jsonl"

    def interrupted(missing: Sequence[Experiment]) -> Results:
        for number, pair in enumerate(fake(missing)):
            if number == 7:
                raise KeyboardInterrupt
            yield pair

    asked = experiments(METHODS)
    with pytest.raises(KeyboardInterrupt):
        complete(ResultStore(path), asked, interrupted)
    assert len(ResultStore(path)) == 7
    lines = perplexity_grid.tables(ResultStore(path), METHODS)
    assert any("results are missing: run again" in line for line in lines)
    assert "…" in "".join(lines)

    seen: list[Experiment] = []

    def recorded(missing: Sequence[Experiment]) -> Results:
        seen.extend(missing)
        return fake(missing)

    complete(ResultStore(path), asked, recorded)
    assert len(seen) == len(asked) - 7
    complete(ResultStore(path), asked, recorded)
    assert len(seen) == len(asked) - 7
    lines = perplexity_grid.tables(ResultStore(path), METHODS)
    assert rows(lines, "wanda")[:3] == [["21.000 ± 1.000"] * len(ERROR_CORRECTIONS)] * 3
    assert rows(lines, "magnitude")[0] == ["20.000"] * len(ERROR_CORRECTIONS)
    assert rows(lines, "least-squares")[0] == ["refused"] * len(ERROR_CORRECTIONS)
    assert "- llama, 2:4, least-squares: refused, it needs a mask" in lines
    assert not any("missing" in line for line in lines)


def test_older_code_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(tmp_path / "grid.jsonl")
    complete(store, [LLAMA], fake)
    assert perplexity_grid.find(store, LLAMA) is not None
    model = perplexity_grid.packaged("llama")
    monkeypatch.setattr(model, "fingerprint", lambda method: "of changed code")
    assert perplexity_grid.find(store, LLAMA) is None
    complete(store, [LLAMA], fake)
    assert perplexity_grid.find(store, LLAMA) is not None
    assert len(store) == 1


# --- held-out errors ---------------------------------------------------------------------


def layer(seed: int = 0) -> CapturedLayer:
    """Layer whose few calibration tokens say little about the others."""
    generator = torch.Generator().manual_seed(seed)
    moments = []
    for tokens in (20, 400):
        accumulator = MomentAccumulator(16)
        accumulator.update(torch.randn(tokens, 16, generator=generator))
        moments.append(accumulator.moments())
    return CapturedLayer("layer", torch.randn(8, 16, generator=generator), *moments)


def test_errors_on_seen_and_unseen_tokens() -> None:
    layers = [layer(0), layer(1)]
    weak = held_out.errors(layers, "wanda+least-squares", "0.5", 1e-4)
    strong = held_out.errors(layers, "wanda+least-squares", "0.5", 0.3)
    assert weak["calibration"] < strong["calibration"]
    assert weak["held_out"] > strong["held_out"]  # it was fitted too well
    assert weak["calibration"] < weak["held_out"]
    assert "FixedMask" in held_out.errors(layers, "least-squares", "0.5", 0.01)["refused"]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "captured_layers", lambda folder, n: [layer(n)])
    monkeypatch.setattr(held_out, "fingerprint", lambda method: "code")


@pytest.mark.usefixtures("_small")
def test_held_out_goes_on_and_names_the_best_damping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "held-out.jsonl"
    methods = ("wanda", "wanda+least-squares", "least-squares")
    done: list[tuple[str, float]] = []
    errors = held_out.errors

    def recorded(layers: Any, method: str, pattern: str, damping: float) -> dict[str, Any]:
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append((method, damping))
        return errors(layers, method, pattern, damping)

    limit = 3
    monkeypatch.setattr(held_out, "errors", recorded)
    with pytest.raises(KeyboardInterrupt):
        held_out.complete(ResultStore(path), tmp_path, methods)
    assert len(ResultStore(path)) == limit
    limit = -1
    held_out.complete(ResultStore(path), tmp_path, methods)
    store = ResultStore(path)
    assert len(done) == len(store)  # nothing was computed twice
    cases = len(held_out.PATTERNS) * len(held_out.SEQUENCES)
    # wanda does not depend on damping and least-squares refuses: two dampings each
    assert len(store) == cases * (2 + len(held_out.DAMPINGS) + 2)
    lines = held_out.tables(store, methods)
    assert len(rows(lines, "wanda")) == cases
    assert all(row[-1] == "any" for row in rows(lines, "wanda"))
    for row in rows(lines, "wanda+least-squares"):
        unseen = [float(cell.split(" / ")[1]) for cell in row[:-1]]
        assert float(row[-1]) in held_out.DAMPINGS
        assert min(unseen) == unseen[held_out.DAMPINGS.index(float(row[-1]))]
    assert all(row[0].startswith("refused") for row in rows(lines, "least-squares"))


# --- captured layers ---------------------------------------------------------------------


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("calibration_text", "evaluation_text"):
        text = getattr(captured, name)()[:40000]
        monkeypatch.setattr(captured, name, lambda text=text: text)
    monkeypatch.setattr(captured, "MODELS", ("opt", "llama"))
    monkeypatch.setattr(captured, "HELD_OUT_SEQUENCES", 3)


@pytest.mark.usefixtures("_short")
def test_layers_are_captured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = captured.captured_layers(tmp_path, 2)
    assert [one.name.split(".")[-1] for one in first] == [
        *("q_proj", "out_proj", "fc1", "fc2"),
        *("q_proj", "o_proj", "up_proj", "down_proj"),
    ]
    for one in first:
        assert one.weight.shape[1] == one.moments.width == one.held_out_moments.width
        assert one.moments.n_tokens == 2 * captured.LENGTH
        assert one.held_out_moments.n_tokens == 3 * captured.LENGTH
        assert not torch.equal(one.moments.gram, one.held_out_moments.gram)
    with monkeypatch.context() as patch:
        patch.setattr(captured, "_capture", None)  # it must come from the cache
        again = captured.captured_layers(tmp_path, 2)
    for one, other in zip(first, again, strict=True):
        assert one.name == other.name
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.moments.gram, other.moments.gram)
    monkeypatch.setattr(captured, "HELD_OUT_SEQUENCES", 1)
    changed = captured.captured_layers(tmp_path, 2)
    assert changed[0].held_out_moments.n_tokens == captured.LENGTH


@pytest.mark.usefixtures("_short")
def test_layers_of_another_block_have_files_of_their_own(tmp_path: Path) -> None:
    second = captured.captured_layers(tmp_path, 1)
    files = {path.name for path in tmp_path.iterdir()}
    third = captured.captured_layers(tmp_path, 1, block=2)
    assert len({path.name for path in tmp_path.iterdir()}) == 2 * len(files)
    for one, other in zip(second, third, strict=True):
        assert one.name.replace("layers.1.", "layers.2.") == other.name
        assert one.weight.shape == other.weight.shape
        assert not torch.equal(one.weight, other.weight)
        assert not torch.equal(one.moments.gram, other.moments.gram)


@pytest.mark.parametrize("block", captured.BLOCKS)
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_every_block_are_in_the_models(model: str, block: int) -> None:
    names = captured.layers_of(model, block)
    blocks = {int(name.split("layers.")[1].split(".")[0]) for name in names}
    assert blocks == ({block, block + 1} if model == "mamba" else {block})
    stored = Checkpoint.open(model_path(model)).weight_map
    assert len(names) == 4
    assert all(f"{name}.weight" in stored for name in names)


def test_identity_depends_on_the_block() -> None:
    found = {captured.identity("llama", 1, block) for block in captured.BLOCKS}
    assert len(found) == len(captured.BLOCKS)
    assert captured.identity("llama", 1) == captured.identity("llama", 1, captured.BLOCK)


# --- race --------------------------------------------------------------------------------


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that a race against magnitude pruning asks for."""
    asked: list[int] = []

    def layers(folder: Path, *, block: int) -> list[CapturedLayer]:
        asked.append(block)
        return [layer()]

    def peer(module: Any, problem: LayerProblem) -> tuple[torch.Tensor, float]:
        return solve(problem, "magnitude").weight, 1.0

    monkeypatch.setattr(alps_race, "captured_layers", layers)
    monkeypatch.setattr(alps_race, "load_peer", lambda folder: None)
    monkeypatch.setattr(alps_race, "run_peer", peer)
    return asked


@pytest.mark.parametrize(("options", "block"), [([], 1), (["--block", "2"], 2)])
def test_race_on_the_layers_of_a_block(
    options: list[str], block: int, raced: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    alps_race.main(["PEER", "CACHE", "--effort", "fast", "--repeats", "1", *options])
    assert raced == [block] * len(alps_race.PATTERNS)
    found = rows(capsys.readouterr().out.splitlines(), "layer")
    by_pattern = [row for row in found if row[0] != "pattern"]
    assert [row[0] for row in by_pattern] == [str(p) for p in alps_race.PATTERNS]
    assert all(float(row[2]) < 1 for row in by_pattern)  # magnitude is easily beaten


def test_race_refuses_blocks_that_no_model_has(
    raced: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        alps_race.main(["PEER", "CACHE", "--block", "3"])
    assert "invalid choice: 3" in capsys.readouterr().err
    assert raced == []


def test_peers_of_the_refit_race_find_the_refit() -> None:
    problem = refit_race.make_problem(layer().held_out_moments.gram, 6, 0.01, 0.5)
    found = solve(problem, "least-squares")
    systems = refit_race.systems_of(problem, 6)
    for peer in refit_race.PEERS.values():
        kept = found.weight.gather(1, systems[2])
        torch.testing.assert_close(peer(*systems), kept, rtol=0, atol=1e-4)


def test_refit_race_tells_every_spectrum_and_sparsity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, str]] = []

    def small(width: int, name: str) -> Tensor:
        asked.append((width, name))
        return layer().held_out_moments.gram

    monkeypatch.setattr(refit_race, "realistic_gram", small)
    monkeypatch.setattr(refit_race, "SHAPES", ((6, 16),))
    monkeypatch.setattr(refit_race, "CROSSOVER", ((16, 4),))
    monkeypatch.setattr(refit_race, "SIDES", (16, 4))
    lines = refit_race.race(1)
    spectra = [refit_race.DRAWN, *refit_race.LAYERS]
    assert len(lines) == 2 + len(spectra) * len(refit_race.DAMPINGS)
    told = {line.split(" | ")[1] for line in lines[2:]}
    assert told == set(spectra)
    assert {name for _, name in asked} == set(refit_race.LAYERS.values())
    assert all(line.count("x") >= 3 for line in lines[2:])
    table = refit_race.crossover(1)
    rows = len(refit_race.DAMPINGS) * len(refit_race.SPARSITIES)
    assert len(table) == 2 + rows
    assert all(line.rstrip(" |").endswith(("direct", "cg")) for line in table[2:])
    counted = refit_race.sides()
    assert len(counted) == 2 + len(refit_race.LAYERS) * len(refit_race.SIDES_DAMPINGS)
    cells = (len(refit_race.WAYS) - 1) * len(refit_race.SIDES_SPARSITIES)
    assert all(line.count("/") == cells for line in counted[2:])
