"""Calibration: windows that are reproducible, and sources that fail with a reason."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from layerwise.errors import DataError, LayerwiseError, UsageError
from layerwise.run.data.calibration import token_windows
from layerwise.run.data.evaluation import evaluation_text
from layerwise.run.data.tokens import encode

TEXT = "the pruned model keeps the weights that matter and drops the rest of them. "
LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=4)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text("".join(f"{i} {TEXT}" for i in range(20)), encoding="utf-8")
    return path


def is_window_of(window: Tensor, stream: Tensor) -> bool:
    return any(torch.equal(window, part) for part in stream.unfold(0, len(window), 1))


# --- windows -------------------------------------------------------------------------


def test_windows_come_from_the_whole_text(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = encode(text_file.read_text(), tokenizer)
    result = token_windows(
        text_file, tokenizer, n_sequences=50, sequence_length=LENGTH, vocab_size=300
    )
    assert result.tokens.shape == (50, LENGTH)
    assert result.tokens.dtype == torch.int64
    assert result.source == str(text_file)
    assert all(is_window_of(window, stream) for window in result.tokens)
    assert len(torch.unique(result.tokens, dim=0)) > 25


def test_both_ends_of_the_stream_are_reached() -> None:
    stream = torch.arange(LENGTH + 2)
    result = token_windows(stream, None, n_sequences=64, sequence_length=LENGTH)
    assert set(result.tokens[:, 0].tolist()) == {0, 1, 2}
    assert set(result.tokens[:, -1].tolist()) == {LENGTH - 1, LENGTH, LENGTH + 1}


def test_seed_decides_and_global_state_is_left_alone(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def draw(seed: int) -> Any:
        return token_windows(
            text_file, tokenizer, n_sequences=4, sequence_length=LENGTH, seed=seed
        )

    state = torch.get_rng_state()
    first = draw(0)
    torch.rand(3)
    again, other = draw(0), draw(1)
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    torch.set_rng_state(state)
    draw(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_hash_is_that_of_the_little_endian_tokens() -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    result = token_windows(rows, None, n_sequences=2, sequence_length=2)
    data = b"".join(i.to_bytes(8, "little") for i in (1, 2, 4, 5))
    assert result.sha256 == hashlib.sha256(data).hexdigest()


ROWS = [list(range(i, i + LENGTH + 2)) for i in range(3)]


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        torch.tensor(ROWS),
        torch.tensor(ROWS, dtype=torch.int32),
        [torch.tensor(row) for row in ROWS],
        [torch.tensor([row]) for row in ROWS],
        np.array(ROWS),
        (row for row in ROWS),
    ],
    ids=["lists", "tensor", "int32", "tensors", "batches of one", "numpy", "generator"],
)
def test_token_sequences_are_cut_not_drawn(source: Any) -> None:
    result = token_windows(source, None, n_sequences=2, sequence_length=LENGTH)
    assert result.tokens.dtype == torch.int64
    assert result.tokens.tolist() == [row[:LENGTH] for row in ROWS[:2]]


def test_endless_source_is_read_as_far_as_needed() -> None:
    def endless() -> Iterator[list[int]]:
        while True:
            yield [1, 2, 3]

    result = token_windows(endless(), None, n_sequences=5, sequence_length=3)
    assert result.tokens.tolist() == [[1, 2, 3]] * 5


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, np.array, iter])
def test_stream_of_ids_is_drawn_from(make: Callable[[list[int]], Any]) -> None:
    ids = list(range(100, 140))
    result = token_windows(make(ids), None, n_sequences=9, sequence_length=LENGTH)
    assert all(is_window_of(window, torch.tensor(ids)) for window in result.tokens)
    assert len(torch.unique(result.tokens[:, 0])) > 1


def test_documents_are_joined_by_an_empty_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = ["the first", "second\u2028 document ä", "third"]
    path = tmp_path / "a:b.jsonl"
    lines = [
        json.dumps({"body": d, "id": i}, ensure_ascii=False)
        for i, d in enumerate(documents)
    ]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\r\n", encoding="utf-8")
    stream = encode("\n\n".join(documents), tokenizer)
    for source in (documents, tuple(documents), f"{path}:body"):
        assert evaluation_text(source) == "\n\n".join(documents)
        whole = token_windows(source, tokenizer, n_sequences=1, sequence_length=len(stream))
        assert torch.equal(whole.tokens[0], stream)
    generated = token_windows(
        iter(documents), tokenizer, n_sequences=1, sequence_length=len(stream)
    )
    assert torch.equal(generated.tokens[0], stream)


def test_long_text_is_encoded_without_a_warning(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # the warning comes once in the life of a tokenizer, so this one is new
    fresh = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=4
    )
    records: list[logging.LogRecord] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Recorder()
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert len(encode(TEXT, fresh)) > 4
        assert records == []
        fresh(TEXT)
        assert len(records) == 1  # the handler would have seen it
    finally:
        logging.getLogger("transformers").removeHandler(handler)


# --- data sets -----------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand-in of the hub; the calls it received."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, *arguments: Any, **options: Any) -> datasets.Dataset:
        calls.append((name, *arguments, options))
        if name == "Salesforce/wikitext":
            rows = ["", f" = {options['split']} = \n", TEXT] * 5
        else:
            rows = ["short", *(f"{i} {TEXT}" for i in range(1200))]
        return datasets.Dataset.from_dict({"text": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_wikitext2(hub: list[Any], tokenizer: PreTrainedTokenizerFast) -> None:
    result = token_windows("wikitext2", tokenizer, n_sequences=6, sequence_length=LENGTH)
    rows = ["", " = train = \n", TEXT] * 5
    stream = encode(" ".join(rows), tokenizer)
    assert all(is_window_of(window, stream) for window in result.tokens)
    whole = token_windows(
        "wikitext2", tokenizer, n_sequences=1, sequence_length=len(stream)
    )
    assert torch.equal(whole.tokens[0], stream)
    assert evaluation_text("wikitext2") == "\n\n".join(["", " = test = \n", TEXT] * 5)
    identifier = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert hub == [
        (*identifier, {"split": "train"}),
        (*identifier, {"split": "train"}),
        (*identifier, {"split": "test"}),
    ]


def test_c4(hub: list[Any], tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [f"{i} {TEXT}" for i in range(1200)]
    encoded = [encode(text, tokenizer) for text in documents]
    length = max(map(len, encoded)) - 1
    long = [tokens for tokens in encoded if len(tokens) > length]
    state = torch.get_rng_state()
    result = token_windows("c4", tokenizer, n_sequences=8, sequence_length=length)
    again = token_windows("c4", tokenizer, n_sequences=8, sequence_length=length)
    assert result.sha256 == again.sha256
    assert torch.equal(torch.get_rng_state(), state)
    origins = [
        [i for i, tokens in enumerate(long) if is_window_of(window, tokens)]
        for window in result.tokens
    ]
    assert all(origins)
    assert len({origin[0] for origin in origins if len(origin) == 1}) > 1
    with pytest.raises(DataError, match=f"c4.*: {len(long)} documents are longer than"):
        token_windows("c4", tokenizer, n_sequences=len(long) + 1, sequence_length=length)
    expected = " ".join(["short", *documents[:1099]])
    assert evaluation_text("c4") == expected
    train = {"train": "en/c4-train.00000-of-01024.json.gz"}
    validation = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert hub == [
        *[("allenai/c4", {"data_files": train, "split": "train"})] * 3,
        ("allenai/c4", {"data_files": validation, "split": "validation"}),
    ]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        message = "Couldn't reach\nthe hub"
        raise ConnectionError(message)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"allenai/c4 .*Couldn't reach the hub; go onl"):
        evaluation_text("c4")


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r'pip install "layerwise\[data\]"'):
        evaluation_text("wikitext2")


# --- failures ------------------------------------------------------------------------

FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n\t\n",
    "short.txt": b"a b",
    "latin.txt": b"caf\xe9",
    "empty.jsonl": b"\n\n",
    "good.jsonl": b'{"body": "hello", "id": 3}\n',
    "garbage.jsonl": b'{"text": "a"}\n\n{"text": \n',
    "deep.jsonl": b"[" * 10**5,
    "missing.jsonl": b'{"text": "a"}\n{"body": "b"}\n',
    "list.jsonl": b'{"text": "a"}\n["b"]\n',
    "number.jsonl": b'{"text": "a"}\n{"text": 5}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
}

TEXT_FAILURES = [
    ("absent.txt", DataError, "cannot read .*absent.txt: No such file"),
    (".txt", DataError, "cannot read"),
    ("empty.txt", DataError, "empty.txt is empty"),
    ("blank.txt", DataError, "blank.txt is empty"),
    ("latin.txt", DataError, r"latin.txt is not UTF-8 \(byte 3\)"),
    ("absent.jsonl:text", DataError, "cannot read .*absent.jsonl"),
    ("empty.jsonl:text", DataError, "empty.jsonl is empty"),
    ("good.jsonl", UsageError, "needs a field, .*found: 'body', 'id'"),
    ("good.jsonl:", UsageError, "needs a field, .*found: 'body', 'id'"),
    ("good.jsonl:text", DataError, "line 1 has no field 'text'; found: 'body', 'id'"),
    ("garbage.jsonl:text", DataError, "garbage.jsonl line 3 is not JSON"),
    ("deep.jsonl:text", DataError, "deep.jsonl line 1 is not JSON"),
    ("missing.jsonl:text", DataError, "line 2 has no field 'text'; found: 'body'"),
    ("list.jsonl:text", DataError, "line 2 holds a list"),
    ("number.jsonl:text", UsageError, "line 2, field 'text' is an int: expected input_id"),
    ("surrogate.jsonl:text", DataError, "line 1, field 'text' has an unpaired surrogate"),
    ("file.csv", UsageError, "unknown text source"),
]


@pytest.mark.parametrize(("name", "error", "match"), TEXT_FAILURES)
def test_text_that_cannot_be_read(
    name: str,
    error: type[Exception],
    match: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for file, content in FILES.items():
        (tmp_path / file).write_bytes(content)
    source = f"{tmp_path}/{name}"
    with pytest.raises(error, match=match) as caught:
        token_windows(source, tokenizer, n_sequences=1, sequence_length=2)
    assert isinstance(caught.value, LayerwiseError)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=match):
        evaluation_text(source)


@pytest.mark.parametrize(
    ("name", "close"),
    [("wikitext", "wikitext2"), ("wikitext-2", "wikitext2"), ("C4", "c4")],
)
def test_unknown_name_answers_with_a_close_one(name: str, close: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{close}'"):
        evaluation_text(name)


def test_too_little_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for source in ([""], [" ", "\n"]):
        with pytest.raises(DataError, match="the list of strings holds no text"):
            token_windows(source, tokenizer, n_sequences=1, sequence_length=LENGTH)
        with pytest.raises(DataError, match="the list of strings holds no text"):
            evaluation_text(source)
    (tmp_path / "short.txt").write_text("a b")
    with pytest.raises(DataError, match=r"short.txt has 3 tokens, a window needs 8"):
        token_windows(
            tmp_path / "short.txt", tokenizer, n_sequences=1, sequence_length=LENGTH
        )


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ([], DataError, "is empty"),
        (torch.zeros(0, 9, dtype=torch.int64), DataError, "is empty"),
        (["text"], UsageError, "needs a tokenizer"),
        (["text", 5], UsageError, "element 1 is an int: expected input_ids, text or"),
        (5, UsageError, "type int is not a calibration source"),
        (ROWS, DataError, "there are 3 token sequences, 4 are needed"),
        ([*ROWS, [1, 2]], DataError, "sequence 3 has 2 tokens, 8 are needed"),
        (range(5), DataError, "stream has 5 tokens, a window needs 8"),
        ([*range(20), 50], DataError, "token id 50 at position 20 .* of 40 entries"),
        ([*range(20), -1], DataError, "token id -1 at position 20 of the token stream"),
        ([ROWS[0], [40] * 8], DataError, "40 at position 0 of sequence 1 is outside"),
        ([[0.5] * 9], UsageError, "sequence 0 is torch.float32"),
        ([0.5] * 9, UsageError, "token stream is torch.float32"),
        (torch.ones(4, 2, 9).long(), UsageError, r"of shape \(2, 9\)"),
        ([[2**70] * 9], UsageError, "does not consist of token ids"),
        ([{"input_ids": [1]}], DataError, "sequence 0 has 1 tokens, 8 are needed"),
    ],
)
def test_ids_that_cannot_be_used(source: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        token_windows(source, None, n_sequences=4, sequence_length=LENGTH, vocab_size=40)
    assert isinstance(caught.value, LayerwiseError)


def test_output_of_a_foreign_tokenizer_is_checked(
    text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = encode(text_file.read_text(), tokenizer)
    worst = int(stream.max())
    position = int(stream.argmax())
    match = f"token id {worst} at position {position} of .*tokenizer's output"
    with pytest.raises(DataError, match=match):
        token_windows(
            text_file, tokenizer, n_sequences=1, sequence_length=2, vocab_size=worst
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n_sequences": 0}, "n_sequences is 0"),
        ({"n_sequences": -3}, "n_sequences is -3"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_impossible_numbers(arguments: dict[str, int], match: str) -> None:
    sizes: dict[str, Any] = {"n_sequences": 1, "sequence_length": 4, **arguments}
    with pytest.raises(UsageError, match=match):
        token_windows(range(9), None, **sizes)
