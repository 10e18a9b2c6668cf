"""Signals: a command that gets one ends in order, and the same command continues."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoConfig

import layerwise
from layerwise.cli import run
from layerwise.cli.signals import NOTHING, stopping_in_order
from layerwise.demo import model_path
from layerwise.errors import Interrupted
from layerwise.run.pipeline.journal import Journal
from layerwise.run.pipeline.results import PrunedBlock
from tests.support.models import shard_hashes, tiny_text

# prunes with the command line, but rests after its first block until a signal comes
RESTING = """
import sys, time
from layerwise.cli import run
from layerwise.run.pipeline.journal import Journal

def rest(journal, index, block, write=Journal.write_block):
    write(journal, index, block)
    print("resting", flush=True)
    time.sleep(60)

Journal.write_block = rest
sys.exit(run(sys.argv[1:]))
"""

KEPT = "layerwise: stopped after 1 of 4 blocks; run the same command to continue"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a text and the result of a prune that nothing stopped."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "text.txt").write_text(tiny_text())
    assert run(prune(folder, "whole")) == 0
    return folder


def prune(folder: Path, output: str) -> list[str]:
    arguments = f"prune {model_path('opt')} --method sparsegpt --sparsity 0.5 --threads 1"
    sizes = "--n-sequences 2 --sequence-length 16"
    files = ["--calibration", str(folder / "text.txt"), "--output", str(folder / output)]
    return [*arguments.split(), *sizes.split(), *files]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_prune_is_stopped_in_order_and_continued(
    number: signal.Signals,
    code: int,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = prune(undisturbed, "out")
    process = subprocess.Popen(
        [sys.executable, "-c", RESTING, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(layerwise.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "resting\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=50)
    assert process.returncode == code
    assert error.splitlines()[-1] == KEPT
    assert "Traceback" not in error
    partial, output = undisturbed / "out.partial", undisturbed / "out"
    assert not output.exists()
    blocks = [path.name[:6] for path in (partial / "layerwise" / "blocks").iterdir()]
    assert blocks == ["00000-"]
    assert run(arguments) == 0
    assert "continuing: 1 of 4 blocks are there\n" in capsys.readouterr().err
    assert shard_hashes(output) == shard_hashes(undisturbed / "whole")
    shutil.rmtree(output)


def stop_twice() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except Exception as error:  # a library that tries again
        pytest.fail(f"SIGTERM was taken for {error!r}")
    finally:
        signal.raise_signal(signal.SIGTERM)  # impatience: tidying up goes on


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)],
)
@pytest.mark.parametrize("notes", [[], ["stopped after 2 of 3 blocks"]])
def test_a_library_that_makes_its_own_error_of_a_signal(
    number: signal.Signals, kind: type[BaseException], notes: list[str]
) -> None:
    def library() -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            error = RuntimeError("panic")
            for note in notes:
                error.add_note(note)
            raise error from None

    with pytest.raises(kind) as caught, stopping_in_order():
        library()
    assert str(caught.value) == (notes[0] if notes else NOTHING)


def test_an_error_without_a_signal_stays_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="panic"), stopping_in_order():
        raise RuntimeError("panic")  # noqa: EM101


@pytest.mark.parametrize(
    ("resume", "words"),
    [(True, "run the same command"), (False, "without --no-resume")],
)
def test_text_says_what_is_kept(tmp_path: Path, resume: bool, words: str) -> None:
    journal = Journal(tmp_path / "out", {}, total=3, parts="layers", resume=resume)
    error = RuntimeError()
    journal.stop(error)
    assert not hasattr(error, "__notes__")  # nothing was saved
    assert list(tmp_path.iterdir()) == []
    journal = Journal(tmp_path / "out", {}, total=3, parts="layers", resume=resume)
    assert journal.continued is None
    journal.write_block(1, PrunedBlock())
    journal.stop(error)
    (note,) = error.__notes__
    assert note.startswith("stopped after 1 of 3 layers; run")
    assert words in note
    again = Journal(tmp_path / "out", {}, total=3, parts="layers")
    assert again.continued == "continuing: 1 of 3 layers are there"


def test_handler_raises_and_the_old_one_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    expected = pytest.raises(Interrupted, match=NOTHING)
    with expected, stopping_in_order():
        stop_twice()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_run_restores_the_handler(outcome: str, capsys: pytest.CaptureFixture[str]) -> None:
    def own(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own)
    try:
        run(["--version"] if outcome == "success" else ["verify", "nowhere"])
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping_in_order():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_may_run_commands(capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_ctrl_c_while_transformers_imports_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def importing(*args: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise ModuleNotFoundError from None

    monkeypatch.setattr(AutoConfig, "from_pretrained", importing)
    (tmp_path / "text.txt").write_text(tiny_text())
    assert run(prune(tmp_path, "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"layerwise: {NOTHING}"
