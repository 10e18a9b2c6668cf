"""Hostile tokenizers and absurd numbers: refused in seconds, in one line."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.calibration import token_windows
from layerwise.run.data.tokens import encode
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.settings import CalibrationData
from tests.support.models import save_checkpoint, tiny_model, tiny_text, tiny_tokenizer

SECONDS = 5.0  # of a refusal
TEXT = tiny_text(400)


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*stages: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(stages)}


def changed(**parts: Any) -> PreTrainedTokenizerFast:
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**state, **parts}))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def split(expression: str) -> dict[str, Any]:
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


LETTER = replace({"String": "e"}, "e" * 20)
HOSTILE = {
    "five times twenty": (
        {"normalizer": sequence(*[LETTER] * 5)},
        "makes [0-9]+ characters or more",
    ),
    "many more": (
        {"normalizer": sequence(*[LETTER] * 90)},
        "makes [0-9]+ characters or more",
    ),
    "nested": ({"normalizer": sequence(LETTER, sequence(LETTER, LETTER))}, "makes 1"),
    "expression": (
        {"normalizer": sequence(*[replace({"Regex": "[a-z]"}, "ab" * 20)] * 9)},
        "makes 1",
    ),
    "one long string": (
        {"normalizer": replace({"String": "e"}, "e" * 10**6)},
        "more than 10",
    ),
    "long prefix": (
        {"normalizer": sequence({"type": "Prepend", "prepend": "a" * 10**6})},
        "more than 1000 characters at once",
    ),
    "search without end": (
        {"pre_tokenizer": split("(?:[a-z ]|[a-z ])*1Z")},
        "cannot encode",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers(name: str) -> None:
    parts, match = HOSTILE[name]
    tokenizer = changed(**parts)
    start = time.perf_counter()
    with pytest.raises(DataError, match=match) as caught:
        encode(TEXT * 50 + "2 1Z", tokenizer)
    assert time.perf_counter() - start < SECONDS
    assert "\n" not in str(caught.value)


def test_a_letter_at_the_end_of_the_text_is_seen() -> None:
    tokenizer = changed(normalizer=sequence(*[replace({"String": "É"}, "É" * 20)] * 5))
    assert len(encode(TEXT, tokenizer)) > 0
    with pytest.raises(DataError, match="check the replacements"):
        encode(TEXT + "É", tokenizer)


@pytest.mark.parametrize(
    "stages",
    [
        [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")],  # LLaMA 2
        [{"type": "NFKC"}, replace({"Regex": " {2,}"}, "▁▁▁▁▁▁▁▁▁▁")],
        [{"type": "NFC"}],
    ],
)
def test_ordinary_normalizers_give_what_they_gave(stages: list[Any]) -> None:
    tokenizer = changed(normalizer=sequence(*stages))
    assert encode(TEXT, tokenizer).tolist() == tokenizer(TEXT)["input_ids"]


def test_slow_tokenizer_is_refused_before_the_whole_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Slow:
        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            assert len(text) <= 4
            time.sleep(0.02)
            return {"input_ids": [1]}

    slow: Any = Slow()
    monkeypatch.setattr("layerwise.run.data.growth.PATIENCE", 0.01)
    with pytest.raises(DataError, match=r"needs 0\.\d s for 4 characters"):
        encode(TEXT, slow)


def test_interruptions_are_not_taken_for_damage() -> None:
    def interrupt(text: str, verbose: bool) -> None:
        raise KeyboardInterrupt

    interrupted: Any = interrupt
    with pytest.raises(KeyboardInterrupt):
        encode(TEXT, interrupted)


@pytest.mark.parametrize("part", ["model", "pre_tokenizer", "added_tokens"])
def test_broken_tokenizer_file(part: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m", tiny_model("llama"))
    path = tmp_path / "m" / "tokenizer.json"
    broken = {**json.loads(path.read_text()), part: split("((((")}
    path.write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(Checkpoint.open(tmp_path / "m"))


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"n_sequences": 10**9}, "1000000000 windows of 12 tokens are more than 268435456"),
        ({"sequence_length": 10**9}, "windows of 1000000000 tokens are more"),
        ({"n_sequences": 2.5}, "n_sequences is 2.5: it must be an integer"),
        ({"n_sequences": True}, "n_sequences is True: it must be an integer"),
        ({"sequence_length": "9"}, "sequence_length is '9': it must be an integer"),
        ({"seed": 0.5}, "seed is 0.5: it must be an integer"),
    ],
)
def test_absurd_numbers(numbers: dict[str, Any], match: str) -> None:
    sizes = {"n_sequences": 4, "sequence_length": 12, "seed": 0, **numbers}
    start = time.perf_counter()
    with pytest.raises(UsageError, match=match):
        token_windows([TEXT], tiny_tokenizer(), **sizes)
    with pytest.raises(UsageError, match=match):
        CalibrationData([TEXT], **sizes).check(tiny_model("mamba"))
    assert time.perf_counter() - start < SECONDS


def test_many_windows_of_a_short_text_are_remarked() -> None:
    stream = torch.arange(150)
    few = token_windows(stream, None, n_sequences=4, sequence_length=50)
    assert few.notes == ()
    many = token_windows(stream, None, n_sequences=51, sequence_length=50)
    assert "has 150 tokens: 51 windows of 50 overlap, and read it 17 times" in many.notes[0]


def test_a_token_outside_the_vocabulary_is_named() -> None:
    tokenizer = tiny_tokenizer()
    worst = int(encode(TEXT, tokenizer).max())
    name = tokenizer.convert_ids_to_tokens(worst)
    with pytest.raises(DataError) as caught:
        encode(TEXT, tokenizer, worst)
    assert f"token id {worst} at" in str(caught.value)
    assert f"({name!r}) is outside the vocabulary of {worst} entries" in str(caught.value)
