"""Expected work of every layer of a run, before the first one is done.

A rough share, to say when a run will end while only the first layers have been timed: the
time of the other blocks follows from that of the first.
"""

from typing import Any

from layerwise.run.pipeline.removal import Run

SOLVING = 6.0  # products of a matrix and its gram; iterative methods take more


def expected_work(run: Run[Any]) -> dict[str, float]:
    """Operations of every layer by name, in the order of the model.

    The first layer of a stage counts the pass up to it, and the gram of its inputs.
    """
    tokens, adapter = run.own_tokens.tokens.numel(), run.task.adapter
    work: dict[str, float] = {}
    for block, module in run.selection.blocks.items():
        passing = tokens * sum(parameter.numel() for parameter in module.parameters())
        for stage in run.selection.stages_of(block):
            shared = float(passing)
            for linear in stage.linears:
                rows, width = adapter.weight(module, linear).shape
                solving = SOLVING * rows * width**2
                work[f"{block}.{linear}"] = solving + shared + tokens * width**2
                shared = 0.0
    return {name: work[name] for name in run.selection.names}
