"""Hashes: of the bytes that a file holds, whatever the type or layout of a tensor."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from layerwise.errors import DataError
from layerwise.run.checkpoints.hashes import (
    bytes_sha256,
    digests,
    file_sha256,
    parameters_sha256,
    tensor_hashes,
)


def test_a_file_has_the_hash_of_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert file_sha256(path) == bytes_sha256(b"content")
    assert bytes_sha256(b"content") == hashlib.sha256(b"content").hexdigest()


def test_a_file_that_cannot_be_read_is_an_error_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^cannot read .*missing: "):
        file_sha256(tmp_path / "missing")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
def test_tensors_have_the_hash_of_their_bytes_in_a_file(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = torch.arange(12).view(3, 4).to(dtype)
    save_file({"a": tensor.T.contiguous()}, tmp_path / "shard")
    stored = (tmp_path / "shard").read_bytes()[-tensor.nbytes :]
    assert tensor_hashes([("a", tensor.T)]) == {"a": bytes_sha256(stored)}


def test_a_model_is_hashed_with_the_names_of_its_parameters() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    second.load_state_dict(first.state_dict())
    assert parameters_sha256(first) == parameters_sha256(second)
    assert digests(first) == digests(second)
    assert digests(first).keys() == {"weight", "bias"}
    renamed = nn.ParameterDict({"weight": first.weight, "other": first.bias})
    assert parameters_sha256(renamed) != parameters_sha256(first)
    assert parameters_sha256(None) == bytes_sha256(b"")
