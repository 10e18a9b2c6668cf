"""BOS: in front of every window of a family that needs it, and only there."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from layerwise.cli import run
from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.bos import NEEDS_BOS, Bos
from layerwise.run.data.calibration import token_windows
from layerwise.run.data.perplexity import perplexity
from layerwise.run.data.texts import Text
from layerwise.run.data.tokens import encode
from layerwise.run.data.windows import Request, text_windows
from layerwise.run.models.opening import load_model
from layerwise.run.prune import prune_model
from tests.support.models import (
    POSITIONS,
    random_tokens,
    save_checkpoint,
    tiny_model,
    tiny_text,
    tiny_tokenizer,
)

BOS = 0  # <end>, the only special token of the tiny tokenizer
LENGTH = 12
COUNT = 5


def adding_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which puts BOS in front of a text as those of Gemma do."""
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.bos_token = "<end>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", BOS)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return adding_tokenizer()


class Notes:
    """A callback that keeps the remarks."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)

    def on_start(self, n_layers: int) -> None: ...
    def on_layer(self, record: Any) -> None: ...
    def on_finish(self, report: Any) -> None: ...


def draw(source: Any, tokenizer: Any, mode: str, family: str, **more: Any) -> Any:
    bos = Bos.of(mode, family, tokenizer, more.pop("config", None))
    sizes = {"n_sequences": COUNT, "sequence_length": LENGTH, **more}
    return token_windows(source, tokenizer, bos=bos, **sizes)


@pytest.mark.parametrize(
    ("mode", "family", "put"),
    [
        ("auto", "gemma", True),
        ("auto", "gemma3_text", True),
        ("auto", "recurrent_gemma", True),
        ("auto", "llama", False),
        ("always", "llama", True),
        ("never", "gemma2", False),
    ],
)
def test_windows_of_text(
    mode: str, family: str, put: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = draw([tiny_text()], tokenizer, mode, family)
    stream = encode(tiny_text(), tokenizer)
    assert int(stream[0]) == BOS
    assert found.tokens.shape == (COUNT, LENGTH)
    assert (found.bos == BOS) == put
    inner = stream[1:].unfold(0, LENGTH - put, 1)
    for window in found.tokens:
        assert (int(window[0]) == BOS) == put
        rest = window[1:] if put else window
        assert int((inner == rest).all(dim=1).sum()) >= 1
    assert bool(found.notes) == put
    if mode != "never":  # the whole text has one BOS, not two
        sizes = {"n_sequences": 1, "sequence_length": len(stream)}
        whole = draw([tiny_text()], tokenizer, mode, family, **sizes)
        assert torch.equal(whole.tokens[0], stream)


def test_windows_of_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each begins with one BOS, also the one that begins where its document does."""
    documents = [tiny_text(40, seed=i) for i in range(4)]
    length = min(len(encode(document, tokenizer)) for document in documents) - 1
    text = Text(documents, " ", "documents", windows="documents")
    request = Request(4, length, 0, bos=Bos(BOS, "auto", "gemma"))
    windows = text_windows(text, tokenizer, request)
    assert windows.shape == (4, length)
    assert bool((windows[:, 0] == BOS).all())
    assert not bool((windows[:, 1:] == BOS).any())


def test_given_windows_change_only_on_demand() -> None:
    rows = random_tokens(COUNT, LENGTH).clamp(min=1)
    kept = draw(rows, None, "auto", "gemma2", config=tiny_model("gemma2").config)
    assert torch.equal(kept.tokens, rows)
    assert "needs BOS (token 0), which the given windows do not" in kept.notes[0]
    rows[2, 0] = BOS
    always = draw(rows, None, "always", "gemma2", config=tiny_model("gemma2").config)
    assert bool((always.tokens[:, 0] == BOS).all())
    assert torch.equal(always.tokens[2], rows[2])
    assert torch.equal(always.tokens[1, 1:], rows[1, :-1])
    begun = torch.cat([torch.zeros(COUNT, 1, dtype=torch.int64), rows[:, 1:]], dim=1)
    silent = draw(begun, None, "auto", "gemma2", config=tiny_model("gemma2").config)
    assert silent.notes == ()


def test_stream_of_ids_takes_bos_from_the_configuration() -> None:
    stream = random_tokens(1, 200)[0].clamp(min=1)
    found = draw(stream, None, "auto", "gemma", config=tiny_model("gemma").config)
    assert bool((found.tokens[:, 0] == BOS).all())


def test_no_bos_to_put() -> None:
    with pytest.raises(UsageError, match="bos is always, but the tokenizer has no BOS"):
        Bos.of("always", "llama", tiny_tokenizer())
    found = draw([tiny_text()], tiny_tokenizer(), "auto", "gemma")
    assert found.bos is None
    assert "gemma needs BOS, but its tokenizer has none" in found.notes[0]
    with pytest.raises(UsageError, match="bos is one of auto, always, never, got 'yes'"):
        Bos.of("yes", "llama")


def test_every_gemma_decoder_is_in_the_table() -> None:
    assert {"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"} <= set(
        NEEDS_BOS
    )
    assert {"gemma4", "gemma4_text", "recurrent_gemma"} <= set(NEEDS_BOS)
    assert "llama" not in NEEDS_BOS
    assert all(NEEDS_BOS.values())


def test_perplexity_with_bos() -> None:
    """Of one window: the loss of its tokens of text, all of them predicted."""
    model = tiny_model("gemma2")
    text = random_tokens(1, 2 * (LENGTH - 1))[0].clamp(min=1)
    losses = []
    for part in text.reshape(2, -1):
        ids = torch.cat([torch.tensor([BOS]), part])[None]
        losses.append(model(ids, labels=ids).loss.detach())
    expected = float(torch.stack(losses).mean().exp())
    for given in (text, torch.cat([torch.tensor([BOS]), text])):
        value = perplexity(model, given, sequence_length=LENGTH, bos=BOS)
        assert value == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, text, sequence_length=LENGTH) != pytest.approx(expected)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bos")
    save_checkpoint(folder / "gemma", tiny_model("gemma2"), tokenizer=False)
    adding_tokenizer().save_pretrained(folder / "gemma")
    (folder / "text.txt").write_text(tiny_text())
    return folder


def test_a_bos_outside_the_vocabulary_is_named() -> None:
    model = tiny_model("gemma2")
    rows = len(model.get_input_embeddings().weight)
    tokens = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(DataError, match=rf"token id {rows} at position 0 of BOS"):
        perplexity(model, tokens, sequence_length=8, bos=rows)


def test_a_run_says_what_it_did(gemma: Path) -> None:
    notes = Notes()
    data: dict[str, Any] = {
        "calibration": gemma / "text.txt",
        "n_sequences": 4,
        "sequence_length": LENGTH,
    }
    for bos in ("auto", "never"):
        prune_model(
            gemma / "gemma",
            "wanda",
            0.5,
            bos=bos,
            output_dir=gemma / bos,
            callbacks=[notes],
            **data,
        )
    about_bos = [text for text in notes.texts if "BOS" in text]
    assert about_bos == ["every window begins with BOS (token 0): gemma2 needs it"]
    said = {"auto": "always", "never": "never"}
    for bos, resolved in said.items():
        manifest = json.loads((gemma / bos / "layerwise/manifest.json").read_text())
        assert manifest["bos"] == resolved
        assert f"bos: {resolved}\n" in (gemma / bos / "recipe.yaml").read_text()
    card = (gemma / "auto/README.md").read_text()
    assert f"| 4 x {LENGTH}, each window begins with BOS |" in card
    assert "contiguous windows" in (gemma / "never/README.md").read_text()


def test_resume_notices_another_bos(gemma: Path) -> None:
    data: dict[str, Any] = {
        "calibration": gemma / "text.txt",
        "n_sequences": 4,
        "sequence_length": LENGTH,
    }

    class Stop(Exception):
        pass

    class Stopping(Notes):
        def on_layer(self, record: Any) -> None:
            if ".1." in record.name:  # the first block is finished
                raise Stop

    for bos, error in (("auto", Stop), ("never", UsageError)):
        with pytest.raises(error):
            prune_model(
                gemma / "gemma",
                "wanda",
                0.5,
                bos=bos,
                output_dir=gemma / "stopped",
                callbacks=[Stopping()],
                **data,
            )


def test_evaluate_says_its_protocol(
    gemma: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = load_model(Checkpoint.open(gemma / "gemma")), str(gemma / "text.txt")
    tokens = encode(tiny_text(), adding_tokenizer())
    line = ["evaluate", str(gemma / "gemma"), "--dataset", text]
    cases = {
        (): ("contiguous, each begins with BOS", {"bos": BOS}),
        ("--bos", "never"): ("contiguous", {}),
        ("--stride", "20"): (
            "sliding by 20, each begins with BOS",
            {"bos": BOS, "stride": 20},
        ),
    }
    for flags, (name, arguments) in cases.items():
        assert run([*line, *flags]) == 0
        out = capsys.readouterr().out
        value = perplexity(model, tokens, sequence_length=POSITIONS, **arguments)
        assert out.startswith(f"perplexity {value:.4f}  (")
        assert out.endswith(f"windows of {POSITIONS} tokens, {name})\n")
    assert run([*line, "--stride", "99"]) == 2
    assert "stride is 99: choose one from 1 to 31" in capsys.readouterr().err


def test_evaluate_reads_ids_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "m", tiny_model("llama"), tokenizer=False)
    rows = random_tokens(3, 20)
    (tmp_path / "ids.json").write_text(json.dumps(rows.tolist()))
    line = ["evaluate", str(tmp_path / "m"), "--sequence-length", "10", "--dataset"]
    assert run([*line, str(tmp_path / "ids.json")]) == 0
    value = perplexity(tiny_model("llama"), rows.flatten(), sequence_length=10)
    assert f"perplexity {value:.4f}" in capsys.readouterr().out
    (tmp_path / "texts.json").write_text(json.dumps([tiny_text()]))
    assert run([*line, str(tmp_path / "texts.json")]) == 2
    assert "needs a tokenizer: pass one" in capsys.readouterr().err
