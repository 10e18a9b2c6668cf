"""README.md of a pruned model, with the header that the model hub reads."""

import json
from collections.abc import Sequence

from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.files import GIVEN
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.outputs.smaller import CHANNELS, Smaller
from layerwise.run.pipeline.records import LayerRecord


def model_card(
    recipe: Recipe,
    source: Checkpoint,
    records: Sequence[LayerRecord],
    smaller: Smaller | None,
) -> str:
    """README.md of the pruned model, with the header that the model hub reads."""
    base = source.config.get("_name_or_path") or recipe.model or "unknown"
    error = sum(record.relative_error for record in records) / len(records)
    worst = max(records, key=lambda record: record.relative_error)
    sparsity = sum(record.sparsity for record in records) / len(records)
    what = _zeros(records) if smaller is None else _smaller(smaller)
    reached = f"{sparsity:.4f} zeros in the pruned layers"
    if smaller is not None:
        share = 1 - smaller.parameters_after / smaller.parameters_before
        reached = f"{share:.4f} of the parameters of the blocks removed"
    return f"""---
base_model: {json.dumps(str(base))}
library_name: transformers
pipeline_tag: text-generation
tags:
- pruned
- sparse
- layerwise
---

# Pruned with layerwise

{what}

| | |
|---|---|
| method | `{recipe.method}` |
| sparsity | {recipe.sparsity} requested, {reached} |
| calibration | {recipe.calibration} |
| calibration tokens | {recipe.n_sequences} x {recipe.sequence_length}, {_windows(recipe)} |
| error correction | {recipe.error_correction} |
| mean relative error of a layer | {error:.4f} |
| worst layer | `{worst.name}`, {worst.relative_error:.4f} |

`recipe.yaml` repeats the run{_provided(recipe)},
`layerwise/layers.jsonl` holds the figures of every layer,
`layerwise/{"masks.safetensors" if smaller is None else CHANNELS}` what was kept, and
`layerwise verify` checks all of it.
"""


def _provided(recipe: Recipe) -> str:
    given = (recipe.calibration or "").endswith(GIVEN)
    return " if it is given the same calibration data" if given else ""


def _windows(recipe: Recipe) -> str:
    return "each window begins with BOS" if recipe.bos == "always" else "contiguous windows"


def _zeros(records: Sequence[LayerRecord]) -> str:
    return f"""\
{len(records)} linear layers of the decoder blocks were pruned; every other tensor has the
bytes of the source. The files are ordinary dense tensors with zeros and open with
`AutoModelForCausalLM.from_pretrained`."""


def _smaller(smaller: Smaller) -> str:
    opens = "`AutoModelForCausalLM.from_pretrained`"
    if smaller.format == "native":
        opens = "`layerwise.load(folder)`: its blocks have widths of their own"
    return f"""\
Channels were removed: the decoder blocks have {smaller.parameters_after:,} parameters,
those of the source {smaller.parameters_before:,}. The model opens with
{opens}."""
