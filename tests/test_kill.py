"""SIGKILL at any point of a run: the same command ends with the same bytes.

Nine stages, three moments of each, three families, and the modes of error correction in
turn; without ``-m exhaustive`` one case of each stage. OPT has a chat template in a folder
of its own, LLaMA replaces an older output, and Mamba keeps its hidden states on disk.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from tests.support.folders import files_of, without_time
from tests.support.models import differing, save_checkpoint, tiny_model
from tests.support.zygote import FAMILIES

BLOCKS = 3
STAGES = (
    "load",
    "capture",
    "forward",
    "gram",
    "solve",
    "block",
    "shard",
    "manifest",
    "rename",
)
MOMENTS = ("first", "middle", "last")
CASES = [
    (stage, moment, family) for stage in STAGES for moment in MOMENTS for family in FAMILIES
]
SHORT = {  # every stage once, every moment and family three times
    (stage, MOMENTS[i % 3], FAMILIES[(i + i // 3) % 3]) for i, stage in enumerate(STAGES)
}
ROOT = Path(layerwise.__file__).parents[1]


class Workshop:
    """Models, a process that runs them, and what they become if nothing disturbs it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._whole: dict[tuple[str, str], list[str]] = {}

    @cached_property
    def _process(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        if "_process" in self.__dict__:
            self._process.kill()
            self._process.communicate()

    def source(self, family: str) -> Path:
        """Checkpoint of several shards."""
        folder = self._folder / family
        if not folder.exists():
            model = tiny_model(family, layers=BLOCKS, dtype=torch.bfloat16)
            save_checkpoint(folder, model, max_shard_size="9KB")
            assert len(list(folder.glob("model-*.safetensors"))) > 2
            if family == "opt":
                (folder / "additional_chat_templates").mkdir()
                (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
        return folder

    def run(
        self, family: str, mode: str, out: Path, fatal: int | None = None, **more: Any
    ) -> dict[str, Any]:
        """Prune in a process of its own, which dies at the fatal point, if there is one."""
        arguments = {
            "model_or_path": str(self.source(family)),
            "method": "sparsegpt",
            "sparsity": 0.5,
            "n_sequences": 6,
            "sequence_length": 12,
            "error_correction": mode,
            "activations": "disk" if family == "mamba" else "memory",
            "output_dir": str(out),
            **more,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "fatal": fatal}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def whole(self, family: str, mode: str) -> tuple[Path, list[str]]:
        """Output of a run that nothing disturbs, and the points that it passes."""
        parent = self._folder / f"{family}-{mode}"
        if (family, mode) not in self._whole:
            parent.mkdir()
            prepare(parent / "out", family)
            ended = self.run(family, mode, parent / "out", force=True)
            assert ended["error"] is None, ended["error"]
            self._whole[family, mode] = ended["passed"]
        return parent / "out", self._whole[family, mode]


def prepare(out: Path, family: str) -> None:
    """Make the older output that a run of LLaMA replaces."""
    if family == "llama":
        (out / "layerwise").mkdir(parents=True)
        (out / "layerwise" / "layers.jsonl").write_text("")  # an output of layerwise
        (out / "old.txt").write_text("precious")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("kill"))
    yield made
    made.close()


def fatal_point(passed: list[str], stage: str, moment: str, family: str) -> int:
    """Number of a point of a stage."""
    points = [number for number, name in enumerate(passed) if name == stage]
    draw = random.Random(f"{stage} {family}")
    middle = draw.choice(points[1:-1])
    return {"first": points[0], "middle": middle, "last": points[-1]}[moment]


@pytest.mark.parametrize(
    ("stage", "moment", "family"),
    [
        pytest.param(*case, marks=[] if case in SHORT else pytest.mark.exhaustive)
        for case in CASES
    ],
)
def test_killed_run_is_continued(
    stage: str, moment: str, family: str, workshop: Workshop, tmp_path: Path
) -> None:
    mode = ERROR_CORRECTIONS[CASES.index((stage, moment, family)) % 4]
    whole, passed = workshop.whole(family, mode)
    fatal = fatal_point(passed, stage, moment, family)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    prepare(out, family)
    old, older = files_of(tmp_path), files_of(out)
    killed = workshop.run(family, mode, out, fatal, force=True)
    assert killed == {"signal": signal.SIGKILL}
    finished = (out / "config.json").exists()
    if not finished:
        kept = [path for path in (out, out.with_name(".out.replaced")) if path.exists()]
        assert [files_of(path) for path in kept] == [older] * bool(old)

    stored = len(list((partial / "layerwise" / "blocks").glob("[!.]*")))
    resumed = workshop.run(family, mode, out, force=not finished)
    if finished:  # all that was missing was to remove what is not needed any more
        assert stage == "rename"
        assert "exists; choose another output" in resumed["error"]
    else:
        assert resumed["error"] is None, resumed["error"]
        solves, again = passed.count("solve"), resumed["passed"].count("solve")
        each = solves // BLOCKS
        assert again == solves - stored * each
        assert passed[:fatal].count("solve") + again <= solves + each
    assert not differing(files_of(out), files_of(whole))
    assert without_time(out) == without_time(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_points_cover_every_stage(workshop: Workshop) -> None:
    for family in FAMILIES:
        _, passed = workshop.whole(family, "block")
        assert set(passed) == set(STAGES)
        assert all(passed.count(stage) >= len(MOMENTS) for stage in STAGES)
