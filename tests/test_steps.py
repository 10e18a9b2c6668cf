"""What a command says about its steps, its layers and its end."""

import io
import time
from typing import Any

import pytest

from layerwise.first_line import COMMANDS, command_of
from layerwise.reports.lines import Lines
from layerwise.reports.progress import PlainProgress
from layerwise.run.remaining import Remaining
from layerwise.run.steps import about, counted, listening, status
from tests.support.models import tiny_model
from tests.support.pruning import prune


def test_statuses_go_to_the_listener_inside_alone() -> None:
    heard: list[str] = []
    status("nobody hears this")
    with listening(heard.append):
        status("reading")
    status("nor this")
    assert heard == ["reading"]


def test_counted_items_say_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 3.0, 6.0, 9.0, 12.0])
    monkeypatch.setattr("layerwise.run.steps.time.perf_counter", lambda: next(clock))
    heard: list[str] = []
    with listening(heard.append):
        assert list(counted("abcde", 5, "hashing")) == list("abcde")
    # every item takes 3 s, and a text comes every 5 s
    assert heard == [
        "hashing",
        "hashing: 2 of 5 done, about 10 s left",
        "hashing: 4 of 5 done, about 5 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 5 s"), (41, "about 45 s"), (200, "about 3 min"), (9000, "about 2.5 h")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert about(seconds) == words


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_kinds_of_layers_keep_their_own_times() -> None:
    """Two blocks: q is thrice as fast as its work says once it has been seen."""
    work = {"b.0.q": 1.0, "b.0.down": 3.0, "b.1.q": 1.0, "b.1.down": 3.0}
    clock = Clock()
    remaining = Remaining(work, clock)
    clock.now = 10.0
    assert remaining.after("b.0.q", 1.0) == pytest.approx(30 + 10 + 30)
    clock.now = 100.0
    assert remaining.after("b.0.down", 1.0) == pytest.approx(10 + 90)
    clock.now = 130.0
    assert remaining.after("b.1.q", 1.0) == pytest.approx(90)
    assert remaining.after("b.1.down", 1.0) is None


def test_restored_layers_say_nothing_about_the_rest() -> None:
    clock = Clock()
    remaining = Remaining({f"b.{i}.q": 1.0 for i in range(4)}, clock)
    clock.now = 0.1
    assert remaining.after("b.0.q", 50.0) is None
    clock.now = 10.1
    assert remaining.after("b.1.q", 9.0) == pytest.approx(20)


def test_only_steps_that_last_get_a_line() -> None:
    stream = io.StringIO()
    with Lines(stream, patience=0.05, silence=0.1) as lines:
        lines.now("quick")
        lines.now("slow")
        time.sleep(0.4)
        lines.write("done")
    written = stream.getvalue().splitlines()
    assert written[0] == "slow"
    assert written[1].startswith("still slow, for")
    assert written[-1] == "done"
    assert "quick" not in written
    time.sleep(0.15)
    assert stream.getvalue().splitlines() == written  # closed


def test_layers_say_when_the_run_ends() -> None:
    stream = io.StringIO()
    prune(tiny_model("llama"), callbacks=[PlainProgress(stream)])
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("[")]
    assert lines[0].startswith("[1/14] about 5 s left  model.layers.0.self_attn.q_proj")
    assert lines[-1].startswith("[14/14]  model.layers.1.mlp.down_proj")


def test_python_gets_the_same_statuses() -> None:
    class Listener:
        def __init__(self) -> None:
            self.said: list[str] = []
            self.left: list[float] = []

        def on_status(self, text: str) -> None:
            self.said.append(text)

        def on_left(self, seconds: float) -> None:
            self.left.append(seconds)

        def on_start(self, n_layers: int) -> None: ...

        def on_layer(self, record: Any) -> None: ...

        def on_finish(self, report: Any) -> None: ...

    listener = Listener()
    prune(tiny_model("llama"), callbacks=[listener])
    said = list(dict.fromkeys(listener.said))
    wanted = (
        "reading the calibration data",
        "embedding",
        "passing",
        "collecting",
        "solving",
    )
    positions = [next(i for i, t in enumerate(said) if t.startswith(w)) for w in wanted]
    assert positions == sorted(positions)
    assert len(listener.left) == 13
    assert all(seconds > 0 for seconds in listener.left)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (["python", "/venv/bin/layerwise", "prune", "M"], "prune"),
        (["python", "-u", "-X", "importtime", "-m", "layerwise", "verify"], "verify"),
        (["python", "-m", "layerwise", "--help"], None),
        (["python", "-m", "pytest", "layerwise", "prune"], None),
        (["python", "-m", "layerwise.planning.scaling", "plan"], None),
        (["python", "-c", "import layerwise", "prune"], None),
        (["python", "script.py", "prune"], None),
        (["python"], None),
    ],
)
def test_only_commands_that_work_have_a_first_line(
    line: list[str], command: str | None
) -> None:
    assert command_of(line) == command


def test_commands_of_the_first_line_exist() -> None:
    from layerwise.cli import COMMANDS as REAL

    assert set(COMMANDS) <= {command.__name__ for command in REAL}
