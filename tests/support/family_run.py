"""One family, from a random model to a checked folder, as a row of a table."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)

from layerwise.adapters.linear import is_linear, matrix
from layerwise.errors import LayerwiseError, UnsupportedModelError, one_line
from layerwise.patterns import NM
from layerwise.planning import plan as planning
from layerwise.run.models.architecture import adapter_of, is_declared
from layerwise.run.models.loading import quiet_transformers
from layerwise.run.outputs.verify import verify
from layerwise.run.prune import prune_model
from tests.support.families import FLOAT32, tiny_config
from tests.support.models import differing, random_tokens, save_checkpoint
from tests.support.planning import FixedRates

SEED = 0
TOKENS = random_tokens(4, 16) % 256 + 8  # special tokens lie outside
RUN: dict[str, Any] = {
    "method": "sparsegpt",
    "sparsity": "2:4",
    "n_sequences": len(TOKENS),
    "sequence_length": TOKENS.shape[1],
    "device": "cpu",
}
HEAD = "lm_head"
ADVICE = re.compile(r"ignore (re:.*)$")
NO_PLAN = "no plan of"
VALUES = "gives another output when it is run on its own"
LONGEST = 1000


@dataclass(frozen=True)
class Row:
    """What became of a family.

    Parameters
    ----------
    family
        Its ``model_type``.
    result
        ``"pruned"``, ``"refused"``, ``"not built"`` or ``"fault"``.
    reason
        Why it, or a part of it, is not pruned; or what is wrong.
    adapter
        ``"declared"`` or ``"found"``.
    pruned, linears
        Number of pruned linears, and of all linears in the decoder blocks.
    """

    family: str
    result: str
    reason: str = ""
    adapter: str = ""
    pruned: int = 0
    linears: int = 0


def tiny(family: str) -> Any:
    """Random model whose layers all matter, in evaluation mode."""
    dtype = torch.float32 if family in FLOAT32 else torch.bfloat16
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = auto_class(family).from_config(tiny_config(family), dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def auto_class(family: str) -> Any:
    """Class that opens the family; a part alone would be stored as another type."""
    kind = CONFIG_MAPPING[family]
    whole = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING
    decoder: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    part = decoder.config_class is not kind
    return AutoModelForMultimodalLM if whole and part else AutoModelForCausalLM


def run_family(family: str, folder: Path) -> Row:
    """Row of a family; its files go into a folder."""
    try:
        model = tiny(family)
    except Exception as error:
        return Row(family, "not built", named(error))
    row = Row(family, "pruned", adapter="declared" if is_declared(model) else "found")
    source = save_checkpoint(folder / "model", model)
    try:
        with patch.object(planning, "quick_machine", FixedRates):
            return _served(row, source, folder / "pruned")
    except LayerwiseError as error:
        return replace(row, result="refused", reason=one_line(error, LONGEST))
    except Exception as error:
        return replace(row, result="fault", reason=named(error))


def named(error: BaseException) -> str:
    """Type and message of an exception."""
    return f"{type(error).__name__}: {one_line(error)}"


def _served(row: Row, source: Path, out: Path) -> Row:
    """Prune a family, without the weights that its refusal names, and check the result."""
    ignore, kind = [HEAD], auto_class(row.family)
    try:
        report = _prune(source, ignore, out)
    except UnsupportedModelError as error:
        _check_plan_refuses(source, error)
        advice = ADVICE.search(str(error))
        if advice is None:
            raise
        row = replace(row, reason=one_line(error, LONGEST))
        ignore += advice[1].split()
        report = _prune(source, ignore, out)
    dense = _stock(source, kind)
    inside = _prune(dense, ignore)
    linears = {
        f"{block}.{name}.weight"
        for block, module in adapter_of(dense).blocks_of(dense).items()
        for name, linear in module.named_modules()
        if is_linear(linear)
    }
    masks = set(report.masks)
    planned, unplanned = _planned(source, ignore, masks)
    opened = _stock(out, kind)
    faults = [
        *(f"verify: {check}" for check in verify(out) if not check.holds),
        *_other("in memory", set(inside.masks), masks),
        *_other("plan", planned, masks),
        *_values(dense, opened),
        *_zeros(opened, masks),
        *_logits(dense, opened),
    ]
    if faults:
        return replace(row, result="fault", reason="; ".join(faults)[:LONGEST])
    reason = "; ".join(filter(None, (row.reason, unplanned)))
    return replace(row, reason=reason, pruned=len(masks), linears=len(linears))


def _prune(model: Any, ignore: list[str], out: Path | None = None) -> Any:
    return prune_model(model, **RUN, calibration=TOKENS, ignore=ignore, output_dir=out)


def _stock(folder: Path, kind: Any = AutoModelForCausalLM) -> Any:
    """Model as stock transformers opens it; every tensor must find its place."""
    with quiet_transformers():
        model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    lost = {name: list(info[name]) for name in info if info[name]}
    if lost:
        message = f"{folder.name} opens with {lost}"
        raise AssertionError(message)
    return model.eval()


def _check_plan_refuses(source: Path, expected: LayerwiseError) -> None:
    """A plan must refuse in the same words what it can know without values."""
    if VALUES in str(expected):
        return
    try:
        planning.plan_run(source, **RUN).check()
    except LayerwiseError as error:
        if str(error) == str(expected) or str(error).startswith(NO_PLAN):
            return
        message = f"plan refuses in other words: {error}"
    else:
        message = f"plan does not refuse, but prune: {expected}"
    raise AssertionError(message)


def _planned(source: Path, ignore: list[str], masks: set[str]) -> tuple[set[str], str]:
    """Weights that a plan prunes; or those expected, and why there is no plan."""
    try:
        plan = planning.plan_run(source, **RUN, ignore=ignore)
    except UnsupportedModelError as error:
        if not str(error).startswith(NO_PLAN):
            raise
        return masks, str(error)
    plan.check()
    return {name for g in plan.groups if g.status == "pruned" for name in g.members}, ""


def _other(what: str, found: set[str], masks: set[str]) -> list[str]:
    odd = sorted(found ^ masks)
    return [f"{what} prunes others: {odd[:2]} of {len(odd)}"] if odd else []


def _values(one: nn.Module, other: nn.Module) -> list[str]:
    here, there = ({k: _bytes(v) for k, v in m.state_dict().items()} for m in (one, other))
    odd = differing(here, there)
    return [f"{len(odd)} tensors differ from a run in memory: {odd[:2]}"] if odd else []


def _bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    entries = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), entries


def _zeros(model: nn.Module, masks: set[str]) -> list[str]:
    pattern = NM(2, 4)
    odd = [
        name
        for name in sorted(masks)
        if not pattern.accepts(
            matrix(model.get_submodule(name.removesuffix(".weight"))) != 0
        )
    ]
    return [f"{odd[0]} is not 2:4"] if odd else []


@torch.no_grad()
def _logits(one: Any, other: Any) -> list[str]:
    here, there = (
        model(input_ids=TOKENS, use_cache=False).logits for model in (one, other)
    )
    if not bool(torch.isfinite(here).all()):
        return ["logits are not finite"]
    return [] if torch.equal(here, there) else ["logits differ from a run in memory"]
