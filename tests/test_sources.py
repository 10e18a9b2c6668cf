"""Sources of calibration: what users have is taken, what is not understood is described."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, PreTrainedTokenizerFast

from layerwise.errors import DataError, LayerwiseError, UsageError
from layerwise.run.data.calibration import token_windows
from layerwise.run.data.evaluation import evaluation_text, evaluation_tokens
from layerwise.run.data.files import GIVEN, check_source
from layerwise.run.data.tokens import encode
from layerwise.run.prune import prune_model
from layerwise.run.settings import CalibrationData
from tests.support.models import random_tokens, tiny_model, tiny_text, tiny_tokenizer

LENGTH = 8
IDS = random_tokens(6, LENGTH, seed=5)
ROWS: list[list[int]] = IDS.tolist()
TEXTS = [tiny_text(40, seed=i) for i in range(4)]
LIST_OF_IDS: Any = IDS  # data sets for a DataLoader
LIST_OF_TEXTS: Any = TEXTS
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    for text in TEXTS
]


def rows_of(source: Any, count: int = 4) -> list[list[int]]:
    found = token_windows(source, None, n_sequences=count, sequence_length=LENGTH)
    rows: list[list[int]] = found.tokens.tolist()
    return rows


def set_of(**columns: Any) -> Any:
    return datasets.Dataset.from_dict(columns)


def split_into(**parts: Any) -> Any:
    splits = datasets.DatasetDict()
    splits.update(parts)
    return splits


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As the loaders of SparseGPT give them: the target has one token that counts."""
    return [(row[None], torch.full_like(row, -100)[None]) for row in IDS]


IDS_SOURCES: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"input_ids": ROWS, "attention_mask": [[1] * LENGTH] * 6},
    "dict of a tensor": lambda: {"input_ids": IDS},
    "encoding of a tokenizer": lambda: BatchEncoding({"input_ids": ROWS}),
    "records": lambda: [{"input_ids": row, "labels": row} for row in ROWS],
    "records of arrays": lambda: [{"input_ids": np.array([row])} for row in ROWS],
    "data set": lambda: set_of(input_ids=ROWS, text=["no"] * 6),
    "data set of tensors": lambda: set_of(input_ids=ROWS).with_format("torch"),
    "stream of a data set": lambda: set_of(input_ids=ROWS).to_iterable_dataset(),
    "one split": lambda: split_into(train=set_of(input_ids=ROWS)),
    "a split by name": lambda: split_into(a=set_of(input_ids=ROWS), b=[])["a"],
    "pairs": pairs,
    "pairs of lists": lambda: [(row, row) for row in ROWS],
    "pairs of arrays": lambda: [[np.array(row), np.array(row)] for row in ROWS],
    "batches of tensors": lambda: DataLoader(LIST_OF_IDS, batch_size=4),
    "batches of pairs": lambda: DataLoader(TensorDataset(IDS, IDS), batch_size=3),
    "batches of one tensor": lambda: DataLoader(TensorDataset(IDS), batch_size=5),
    "batches of dicts": lambda: DataLoader(
        set_of(input_ids=ROWS).with_format("torch"),
        batch_size=4,
    ),
    "ids, masks, labels": lambda: DataLoader(
        TensorDataset(IDS, IDS * 0, IDS), batch_size=3
    ),
    "batches of lists": lambda: [ROWS[:2], ROWS[2:]],
}


@pytest.mark.parametrize("name", IDS_SOURCES)
def test_token_ids_of_objects(name: str) -> None:
    state = torch.get_rng_state()
    assert rows_of(IDS_SOURCES[name]()) == ROWS[:4]
    assert torch.equal(torch.get_rng_state(), state)


TEXT_SOURCES: dict[str, Callable[[], Any]] = {
    "records": lambda: [{"text": text, "id": 3} for text in TEXTS],
    "columns": lambda: {"text": TEXTS, "id": [1, 2, 3, 4]},
    "data set": lambda: set_of(text=TEXTS, id=[1, 2, 3, 4]),
    "its column": lambda: set_of(text=TEXTS)["text"],
    "stream of a data set": lambda: set_of(text=TEXTS).to_iterable_dataset(),
    "batches": lambda: DataLoader(LIST_OF_TEXTS, batch_size=3),
    "batches of dicts": lambda: [{"text": TEXTS[:3]}, {"text": TEXTS[3:]}],
}


@pytest.mark.parametrize("name", TEXT_SOURCES)
def test_texts_of_objects(name: str) -> None:
    assert evaluation_text(TEXT_SOURCES[name]()) == "\n\n".join(TEXTS)
    sizes: dict[str, Any] = {"n_sequences": 3, "sequence_length": LENGTH}
    found = token_windows(TEXT_SOURCES[name](), tiny_tokenizer(), **sizes)
    expected = token_windows(TEXTS, tiny_tokenizer(), **sizes)
    assert torch.equal(found.tokens, expected.tokens)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    "source",
    [
        CHATS,
        [{"messages": chat} for chat in CHATS],
        {"messages": CHATS},
        set_of(messages=CHATS),
        (chat for chat in CHATS),
    ],
    ids=["lists", "records", "columns", "data set", "generator"],
)
def test_chats_go_through_the_template(source: Any) -> None:
    """Without the BOS of the template: the windows decide about it."""
    tokenizer = chat_tokenizer()
    found = evaluation_tokens(source, tokenizer)
    expected = "\n\n".join(f"[user]{text}[assistant]yes" for text in TEXTS)
    assert found.tolist() == encode(expected, tokenizer).tolist()


def test_one_chat_and_broken_ones() -> None:
    sizes: dict[str, Any] = {"n_sequences": 1, "sequence_length": 4}
    found = token_windows(CHATS[0], chat_tokenizer(), **sizes)
    assert found.source == "the chats"
    with pytest.raises(UsageError, match=r"refuses chat 0: .*chat_template"):
        token_windows(CHATS, tiny_tokenizer(), **sizes)
    broken = [[*CHATS[0], {"text": "a"}]]
    with pytest.raises(UsageError, match="chat 0 holds a dict with keys text: a message"):
        token_windows(broken, chat_tokenizer(), **sizes)


def test_endless_texts_are_read_as_far_as_needed() -> None:
    def endless() -> Any:
        while True:
            yield {"text": TEXTS[0]}

    found = token_windows(endless(), tiny_tokenizer(), n_sequences=2, sequence_length=4)
    assert found.tokens.shape == (2, 4)


# --- files ---------------------------------------------------------------------------


def lines_of(records: list[Any]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def parquet_of(**columns: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


NESTED = [{"data": {"body": text}} for text in TEXTS]
TEXT_FILES: dict[str, tuple[bytes, str]] = {
    "a.jsonl": (lines_of([{"text": text} for text in TEXTS]), ""),
    "a.jsonl.gz": (gzip.compress(lines_of([{"text": text} for text in TEXTS])), ":text"),
    "b.jsonl": (lines_of(NESTED), ":data.body"),
    "c.jsonl": (lines_of([{"data.body": text} for text in TEXTS]), ":data.body"),
    "d.jsonl": (lines_of([*TEXTS]), ""),
    "a.txt.gz": (gzip.compress("\n\n".join(TEXTS).encode()), ""),
    "a.json": (json.dumps(TEXTS).encode(), ""),
    "b.json": (json.dumps([{"text": text} for text in TEXTS]).encode(), ":text"),
    "c.json": (
        json.dumps({"rows": [{"body": text} for text in TEXTS]}).encode(),
        ":rows.body",
    ),
    "d.json.gz": (gzip.compress(json.dumps({"text": TEXTS}).encode()), ""),
    "a.parquet": (parquet_of(text=TEXTS, id=[1, 2, 3, 4]), ""),
    "B.PARQUET": (parquet_of(id=[1, 2, 3, 4], body=TEXTS), ":body"),
    "c.parquet": (parquet_of(data=[record["data"] for record in NESTED]), ":data.body"),
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_texts_of_files(name: str, tmp_path: Path) -> None:
    content, field = TEXT_FILES[name]
    (tmp_path / name).write_bytes(content)
    source = f"{tmp_path / name}{field}"
    check_source(source)
    assert evaluation_text(source) == "\n\n".join(TEXTS)


ID_FILES = {
    "a.jsonl": (lines_of([{"input_ids": row} for row in ROWS]), ""),
    "b.jsonl": (lines_of(ROWS), ""),
    "a.json": (json.dumps(ROWS).encode(), ""),
    "a.parquet": (parquet_of(tokens=ROWS), ":tokens"),
}


@pytest.mark.parametrize("name", ID_FILES)
def test_ids_of_files(name: str, tmp_path: Path) -> None:
    content, field = ID_FILES[name]
    (tmp_path / name).write_bytes(content)
    source = f"{tmp_path / name}{field}"
    assert rows_of(source) == ROWS[:4]
    assert evaluation_tokens(source, None).tolist() == IDS.flatten().tolist()


REFUSED: dict[str, tuple[bytes, str, type[LayerwiseError], str]] = {
    "bad.parquet": (b"PAR1 no", "", DataError, "bad.parquet"),
    "body.parquet": (parquet_of(body=TEXTS), "", UsageError, "needs a field.*: 'body'"),
    "none.parquet": (
        parquet_of(body=TEXTS),
        ":text",
        DataError,
        "no field 'text'; .*'body'",
    ),
    "number.parquet": (
        parquet_of(text=[1]),
        "",
        UsageError,
        "is an int: expected input_ids",
    ),
    "cut.txt.gz": (gzip.compress(b"abc" * 99)[:-9], "", DataError, "as gzip"),
    "no.jsonl.gz": (b'{"text": "a"}', "", DataError, "as gzip"),
    "null.jsonl": (b'{"text": null}', "", UsageError, "is a NoneType: expected"),
    "deep.json": (
        b"[" * 60 + b"1.5" + b"]" * 60,
        "",
        UsageError,
        "a list of 1 list of 1 list of 1 list: ",
    ),
    "mixed.json": (
        b'["a", [1, 2]]',
        "",
        UsageError,
        "token ids, the elements before it te",
    ),
    "empty.json": (b"[]", "", UsageError, "is an empty list: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str, tmp_path: Path) -> None:
    content, field, error, match = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=match) as caught:
        evaluation_text(f"{tmp_path / name}{field}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (
            [{"a": 1, "b": 2}] * 3,
            "a list of 3 dicts with keys a, b: expected input_ids, te",
        ),
        ([{"a": 1}], "a list of 1 dict with keys a: expected"),
        ({"c": [1]}, "a dict with keys c: expected"),
        ([None] * 2, "a list of 2 NoneTypes: expected"),
        ([b"bytes"], "a list of 1 bytes: expected"),
        (set_of(a=[1], b=[2]), "element 0 is a dict with keys a, b"),
        (
            split_into(train=set_of(text=["a"]), test=set_of(text=["b"])),
            "the splits 'train', 'test': pass one",
        ),
        (["text", [1, 2]], "element 1 holds token ids, the elements before it text"),
        ([[IDS[0], IDS[0], IDS[0]]], "a list of 1 list of 3 tensors of torch.int64, shape"),
        ([[{}]], "a list of 1 list of 1 dict without keys"),
    ],
)
def test_objects_that_are_not_understood(source: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        token_windows(source, tiny_tokenizer(), n_sequences=1, sequence_length=2)


@pytest.mark.parametrize("package", ["pyarrow"])
def test_missing_package(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(TEXT_FILES["a.parquet"][0])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r'pip install "layerwise\[data\]"'):
        evaluation_text(tmp_path / "a.parquet")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.txt")
    for read in (check_source, evaluation_text):
        with pytest.raises(DataError, match="is not a regular file"):
            read(tmp_path / "a.txt")


def test_gzip_that_grows_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.run.data.files.LARGEST", 1 << 16)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * (1 << 17)))
    with pytest.raises(DataError, match="more than 65536 bytes of text"):
        evaluation_text(tmp_path / "a.txt.gz")


def test_a_recipe_says_whether_it_can_be_repeated(tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    sizes: dict[str, Any] = {"n_sequences": 4, "sequence_length": LENGTH}
    prune_model(
        model, "wanda", 0.5, calibration={"input_ids": IDS}, output_dir=out, **sizes
    )
    assert f"calibration: token ids{GIVEN}\n" in (out / "recipe.yaml").read_text()
    card = " ".join((out / "README.md").read_text().split())
    assert "repeats the run if it is given the same calibration data" in card
    with pytest.raises(UsageError, match="is not in it: give the same data again"):
        CalibrationData(f"token ids{GIVEN}").check(model)
