"""Files whose types are not the one in config.json: results get the types of the files."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerwise.errors import DataError, UnsupportedModelError
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.solve_grams import solve_grams
from layerwise.planning.plan import plan_run
from layerwise.run.activations.streams import capture, evaluation_mode
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.headers import Headers
from layerwise.run.models.opening import load, open_model
from layerwise.run.models.stored_types import in_stored_type
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.block_files import WEIGHT, BlockFolder
from layerwise.run.pipeline.parallel import BlockWork, open_blocks, write_hidden
from layerwise.run.prune import prune_model
from layerwise.run.settings import Settings
from layerwise.run.workers.messages import WorkerSpec
from tests.support.models import SHARD, edit_shard, save_checkpoint, tiny_model
from tests.support.pruning import CALIBRATION
from tests.support.retraining import retrain
from tests.support.text_runs import by_path

WINDOWS: dict[str, Any] = {
    "calibration": CALIBRATION,
    "n_sequences": len(CALIBRATION),
    "sequence_length": CALIBRATION.shape[1],
}
Types = Mapping[str, torch.dtype]  # part of a name -> type in the file
PRECISE: Types = MappingProxyType({"": torch.float32})


def folder_with(
    folder: Path, stored: Types, config: Mapping[str, Any], family: str = "llama"
) -> Path:
    """A model in bfloat16 with other types in its file, and its config.json edited."""
    save_checkpoint(folder, tiny_model(family))

    def cast(tensors: dict[str, Tensor]) -> None:
        for part, dtype in {"": torch.bfloat16, **stored}.items():
            tensors |= {n: t.to(dtype) for n, t in tensors.items() if part in n}

    # from float32, so that a wider type has bits that bfloat16 has not
    exact = load_file(folder / SHARD)
    edit_shard(folder / SHARD, cast)
    edit_shard(
        folder / SHARD,
        lambda tensors: tensors.update(
            {name: exact[name].to(tensor.dtype) for name, tensor in tensors.items()}
        ),
    )
    path = folder / "config.json"
    plain = json.loads(path.read_text())
    plain.pop("dtype")
    path.write_text(json.dumps({**plain, **config}))
    return folder


def survivors_are_stored(source: Path, output: Path) -> int:
    """Number of pruned tensors, whose other entries have the bits of the file."""
    before, after = load_file(source / SHARD), load_file(output / SHARD)
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    pruned = 0
    for name, tensor in after.items():
        kept = tensor != 0 if "_proj" in name else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[kept], before[name][kept]), name
        pruned += float(kept.float().mean()) < 1
    return pruned


CASES: Mapping[str, tuple[Types, Mapping[str, Any]]] = {
    "wider": (PRECISE, {"torch_dtype": "float16"}),
    "widest": ({"": torch.float64}, {"dtype": "bfloat16"}),
    "narrower": ({"": torch.float16}, {"dtype": "float32"}),
    "neither": ({"": torch.float16}, {"dtype": "bfloat16"}),
    "norms": ({"norm": torch.float32}, {"dtype": "bfloat16"}),
    "one linear": ({"down_proj": torch.float32}, {"torch_dtype": "bfloat16"}),
    "mixed without type": ({"up_proj": torch.float32}, {}),
    "both keys": ({}, {"torch_dtype": "float32", "dtype": "bfloat16"}),
    "keys that differ": (PRECISE, {"torch_dtype": "float32", "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_pruned_tensors_get_the_type_of_their_file(case: str, tmp_path: Path) -> None:
    source = folder_with(tmp_path / "model", *CASES[case])
    prune_model(source, "wanda", 0.5, output_dir=tmp_path / "out", **WINDOWS)
    assert survivors_are_stored(source, tmp_path / "out") == 14
    written = (tmp_path / "out/config.json").read_bytes()
    assert written == (source / "config.json").read_bytes()


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of float32 tensors whose config.json says bfloat16, and its prune."""
    root = tmp_path_factory.mktemp("precise")
    source = folder_with(root / "model", PRECISE, {"dtype": "bfloat16"})
    prune_model(
        source,
        "wanda+least-squares",
        0.5,
        error_correction="none",
        output_dir=root / "out",
        **WINDOWS,
    )
    return root


def test_plan_and_verify_know_the_types_of_the_files(precise: Path) -> None:
    plan = plan_run(precise / "model", "wanda", 0.5, n_sequences=4, sequence_length=12)
    assert plan.refusal is None
    finished = plan.disk["finished blocks, until the end"]
    before = load_file(precise / "model" / SHARD)
    weights = sum(t.numel() for name, t in before.items() if "_proj" in name)
    assert finished == 4 * weights + weights // 8
    assert all(check.holds for check in verify(precise / "out"))


def test_weights_that_move_are_solved_in_the_type_of_the_file(precise: Path) -> None:
    after = load_file(precise / "out" / SHARD)["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(after, after.bfloat16().float())


def test_stored_grams_give_the_bytes_of_a_prune(precise: Path, tmp_path: Path) -> None:
    collect_grams(precise / "model", tmp_path / "grams", **WINDOWS)
    solve_grams(
        tmp_path / "grams",
        "wanda+least-squares",
        output_dir=tmp_path / "out",
        model=precise / "model",
    )
    written = (tmp_path / "out" / SHARD).read_bytes()
    assert written == (precise / "out" / SHARD).read_bytes()


def test_a_worker_writes_the_type_of_the_file(precise: Path, tmp_path: Path) -> None:
    settings = Settings.of("wanda", 0.5)
    opened = open_model(precise / "model", streamed=True)
    blocks = list(opened.adapter.blocks_of(opened.model).values())
    with evaluation_mode(opened.model), opened.residency.entrance(blocks[0]):
        hidden = capture(opened.model, blocks, [CALIBRATION]).hidden
    write_hidden(tmp_path, 0, hidden)
    removal: Any = settings.removal
    entries: Any = ("Linear",), ()
    rest: Any = "block", CALIBRATION, tmp_path, "run"
    work = BlockWork(precise / "model", removal, removal, *entries, *rest)
    name = open_blocks(work, WorkerSpec(0, "cpu", 1))(0)
    folder = BlockFolder(tmp_path, "run", {0: name})
    weight = folder.read_tensor(WEIGHT, 0, "mlp.up_proj")
    stored = load_file(precise / "model" / SHARD)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight[weight != 0], stored[weight != 0])


def test_a_model_in_memory_keeps_the_type_of_its_configuration(precise: Path) -> None:
    report = prune_model(precise / "model", "wanda", 0.5, **WINDOWS)
    assert report.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "format"), [("columns", "stock"), ("flap", "native"), ("fasp", "padded")]
)
def test_smaller_models_have_the_types_of_the_files(
    method: str, format: str, tmp_path: Path
) -> None:
    types = {"": torch.float32, "up_proj": torch.float16}
    source = folder_with(tmp_path / "model", types, {"torch_dtype": "bfloat16"})
    options: dict[str, Any] = {"multiple": 1, "format": format, **WINDOWS}
    report = prune_model(source, method, 0.2, output_dir=tmp_path / "out", **options)
    before, after = load_file(source / SHARD), load_file(tmp_path / "out" / SHARD)
    for name, tensor in after.items():
        expected = torch.float16 if "up_proj" in name else torch.float32
        assert tensor.dtype == expected, name
        if "norm" in name or "q_proj" in name or "embed" in name:
            assert torch.equal(tensor, before[name]), name
    up = "model.layers.0.mlp.up_proj.weight"
    rows = {tuple(row) for row in before[up].tolist()}
    assert all(tuple(row) in rows or not any(row) for row in after[up].tolist())
    assert after[up].shape != before[up].shape or format == "padded"
    assert {p.dtype for p in report.model.parameters()} == {torch.bfloat16}
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert all(check.holds for check in verify(tmp_path / "out"))


def test_retraining_writes_the_types_of_the_files(precise: Path, tmp_path: Path) -> None:
    retrain(precise / "out", parameters="masklora", output_dir=tmp_path / "out")
    before = load_file(precise / "out" / SHARD)
    after = load_file(tmp_path / "out" / SHARD)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after[name], before[name])
    assert torch.equal(after[name] == 0, before[name] == 0)
    assert all(check.holds for check in verify(tmp_path / "out"))


def test_entries_that_a_retraining_leaves_alone_keep_their_bits(precise: Path) -> None:
    checkpoint, name = Checkpoint.open(precise / "model"), "model.norm.weight"
    stored = load_file(precise / "model" / SHARD)[name]
    value = stored.bfloat16()
    value[3] = 5.0
    new = in_stored_type(checkpoint, name, value)
    assert new[3] == 5.0
    new[3] = stored[3]
    assert torch.equal(new, stored)


SPARSE = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "auto", "torch_dtype": "auto"},
        {"quantization_config": SPARSE},
        {"quantization_config": {}},
    ],
)
def test_keys_that_say_nothing_are_left_out(
    config: Mapping[str, Any], tmp_path: Path
) -> None:
    source = folder_with(tmp_path / "model", {}, config)
    report = by_path(source, tmp_path / "out")
    assert len(report.records) == 14
    plain = json.loads((source / "config.json").read_text())
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {key: plain[key] for key in plain if key not in config}
    assert load(source).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SPARSE, "config_groups": {"0": {"weights": {"num_bits": 8}}}}, "is quantised"),
        ({**SPARSE, "sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed"),
        ({"quant_method": "gptq", "bits": 4, "sparsity_config": {}}, "is quantised"),
        ([4], "is quantised"),
    ],
)
def test_quantised_or_compressed_weights_are_refused(
    settings: Any, message: str, tmp_path: Path
) -> None:
    source = folder_with(tmp_path / "model", {}, {"quantization_config": settings})
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint.open(source)


@pytest.mark.parametrize("value", ["int8", "bfloat17", "torch.float16", 16, ["float32"]])
def test_a_type_that_no_model_has_is_refused(value: Any, tmp_path: Path) -> None:
    source = folder_with(tmp_path / "model", {}, {"dtype": value})
    with pytest.raises(DataError, match=r"dtype .* is not one of float64, float32"):
        load(source)


def integers(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name].float() * 20).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn]
)
def test_other_types_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    """A cast of integers would be another model, so every command refuses them."""
    source = save_checkpoint(tmp_path / "model", tiny_model("llama"), tokenizer=False)
    edit_shard(source / SHARD, partial(integers, dtype=dtype))
    opens: tuple[Callable[[], Any], ...] = (
        lambda: load(source),
        lambda: open_model(source, streamed=True),
        lambda: Headers.read(Checkpoint.open(source)),
    )
    for opening in opens:
        with pytest.raises(UnsupportedModelError, match=r"1\.mlp\.up_proj.*stored as"):
            opening()
