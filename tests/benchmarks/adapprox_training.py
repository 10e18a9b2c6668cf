"""The packaged LLaMA from scratch with AdamW and with Adapprox, on the same batches.

Part of ``python -m tests.benchmarks.adapprox``. Schedule, weight decay, clipping of the
gradient, text and model are those of ``layerwise.demo.train``.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM

from layerwise.demo import calibration_text, evaluation_text
from layerwise.demo.train import (
    CONFIGS,
    CONTEXT,
    LEARNING_RATE,
    WARM_UP,
    WEIGHT_DECAY,
    perplexity,
    train_tokenizer,
)
from layerwise.reports.plots import COLOURS, SETTINGS, import_matplotlib
from layerwise.solvers.adapprox import Adapprox

LAST = 20  # steps over which the final loss is averaged
BETAS = (0.9, 0.95)

OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = MappingProxyType(
    {
        "AdamW": lambda groups: AdamW(groups, lr=LEARNING_RATE, betas=BETAS),
        "Adapprox": lambda groups: Adapprox(groups, lr=LEARNING_RATE, betas=BETAS),
    }
)


@dataclass(frozen=True)
class Outcome:
    """Losses and ranks of every step, and the loss on held-out text."""

    losses: list[float] = field(default_factory=list)
    ranks: list[dict[str, int]] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)  # one number, at the end

    @property
    def last(self) -> float:
        return sum(self.losses[-LAST:]) / len(self.losses[-LAST:])


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens to train on, and held-out ones."""

    tokens: Tensor
    held_out: Tensor

    @classmethod
    def packaged(cls) -> "Text":
        tokenizer = train_tokenizer(calibration_text())
        texts = calibration_text(), evaluation_text()
        return cls(*(torch.tensor(tokenizer.encode(text)) for text in texts))


def steps(
    make: Callable[[Any], Optimizer], text: Text, count: int, batch: int
) -> Iterator[tuple[Any, Optimizer, float]]:
    """Model, optimizer and loss of every step, with the gradients still there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = make(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / count)
        ),
    )
    generator, window = torch.Generator().manual_seed(0), torch.arange(CONTEXT)
    model.train()
    for _ in range(count):
        first = torch.randint(len(text.tokens) - CONTEXT, (batch, 1), generator=generator)
        tokens = text.tokens[first + window]
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield model, optimizer, loss.item()


def train(name: str, text: Text, count: int, batch: int) -> Outcome:
    """Train once and measure."""
    outcome, model = Outcome(), None
    for model, optimizer, loss in steps(OPTIMIZERS[name], text, count, batch):
        outcome.losses.append(loss)
        if isinstance(optimizer, Adapprox):
            names = {p: n for n, p in model.named_parameters()}
            given = [p for group in optimizer.param_groups for p in group["params"]]
            ranked = zip(given, optimizer.ranks(), strict=True)
            outcome.ranks.append({names[p]: k for p, k in ranked if k is not None})
        if len(outcome.losses) % 50 == 0:
            sys.stderr.write(f"{name} step {len(outcome.losses)}: {outcome.last:.4f}\n")
    outcome.held_out.append(math.log(perplexity(model, text.held_out)))
    return outcome


def table(folder: Path, count: int, batch: int) -> list[str]:
    """Train what is not in the folder yet; lines of Markdown and a picture of ranks."""
    text, outcomes = None, {}
    for name in OPTIMIZERS:
        path = folder / f"{name.lower()}-{count}-{batch}.json"
        if not path.is_file():
            text = text or Text.packaged()
            path.write_text(json.dumps(asdict(train(name, text, count, batch))))
        outcomes[name] = Outcome(**json.loads(path.read_text()))
    draw_ranks(outcomes["Adapprox"].ranks, folder / "ranks.svg")
    ours, base = outcomes["Adapprox"], outcomes["AdamW"]
    return [
        f"{count} steps of {batch} windows of {CONTEXT} tokens:",
        "",
        f"| optimizer | loss, mean of the last {LAST} steps | held-out loss |",
        "|---|---|---|",
        *(
            f"| {name} | {outcome.last:.4f} | {outcome.held_out[0]:.4f} |"
            for name, outcome in outcomes.items()
        ),
        f"| ratio | {ours.last / base.last:.4f} | "
        f"{ours.held_out[0] / base.held_out[0]:.4f} |",
    ]


def draw_ranks(ranks: list[dict[str, int]], path: Path) -> None:
    """Picture of the mean rank of each kind of matrix over the steps."""
    matplotlib = import_matplotlib()
    kinds: dict[str, list[str]] = {}
    for name in ranks[0]:
        kinds.setdefault(name.split(".")[-2], []).append(name)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": "ranks"})
        figure = matplotlib.figure.Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, (kind, names) in enumerate(kinds.items()):
            means = [sum(step[name] for name in names) / len(names) for step in ranks]
            axes.plot(
                range(1, len(means) + 1),
                means,
                label=kind,
                color=COLOURS[index % len(COLOURS)],
                linestyle="-" if index < len(COLOURS) else "--",
                linewidth=1.3,
            )
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel("mean rank of the second moment")
        axes.legend(frameon=False, fontsize=8, ncols=2)
        figure.savefig(path, metadata={"Date": None})
