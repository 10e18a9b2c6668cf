"""Surgery: remove the rows and columns of channels from a model.

The contribution of the removed channels is lost. After a run the columns that read them are
zero, and the smaller model computes the same as the larger one. Everything is checked
before the first parameter is replaced. Modules are kept, with smaller parameters, and so
are their hooks. The remaining entries keep their type and their bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from layerwise.adapters import Adapter
from layerwise.run.models.cuts import Cut, CutPlan, Step
from layerwise.run.models.rewrite import add_bias, update_bias_attributes
from layerwise.run.models.stock import Format, check_format, plan_stock

__all__ = ["Cut", "Step", "make_stock", "shrink", "steps_of"]

RECORD = "_layerwise_surgery"  # attribute of a model that only the native format holds


def shrink(
    model: Any, adapter: Adapter, cuts: Iterable[Cut], format: Format = "stock"
) -> None:
    """Remove channels from a model, in place.

    Parameters
    ----------
    model
        A model of transformers.
    adapter
        Its declaration.
    cuts
        Every coupling of a block at most once; couplings that are not named are not
        changed. Indices of units are those of the given model, so heads and values of a
        block must be cut in one call.
    format
        ``"stock"``: the configuration is updated, and ``save_pretrained`` writes a model
        that transformers opens. Linears get biases of zeros if others with the same flag
        have one. ``"native"``: blocks may differ in every way, and
        :func:`layerwise.run.models.native.save_native` writes the model.

    Raises
    ------
    UsageError
        If a cut is impossible, or the stock format cannot represent the result; the
        message says what to change.
    UnsupportedModelError
        If channels are not declared for this architecture, or a parameter that would
        shrink is shared with another module.
    """
    cuts = list(cuts)
    check_format(model, adapter, {cut.coupling for cut in cuts}, format)
    plan = CutPlan(model, adapter, cuts)
    if format == "stock":
        stock = plan_stock(model, adapter, plan.widths, plan.shapes())
        plan.apply()
        make_stock(model, adapter, stock.changes, stock.zero_biases)
    else:
        plan.apply()
        update_bias_attributes(model, adapter)
        setattr(model, RECORD, [*steps_of(model), plan.step()])


def steps_of(model: nn.Module) -> list[Step]:
    """Cuts of a model that only the native format can represent, call by call."""
    steps: list[Step] = getattr(model, RECORD, [])
    return steps


def make_stock(
    model: Any, adapter: Adapter, changes: Mapping[str, Any], zero_biases: Iterable[str]
) -> None:
    """Change configuration and biases as the stock format needs it."""
    for name in zero_biases:
        linear = model.get_submodule(name)
        add_bias(linear, torch.zeros(len(linear.weight), device=linear.weight.device))
    for name, value in changes.items():
        setattr(model.config, name, value)
    update_bias_attributes(model, adapter)
    if hasattr(model, RECORD):
        delattr(model, RECORD)
