"""What becomes of every tensor of a checkpoint when transformers loads it.

Transformers renames and converts stored tensors while it loads a model, leaves some out on
purpose, and drops those that its configuration does not know. Its own rules are applied to
the names in the headers, so all of this is known before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn

from layerwise.errors import DataError

if TYPE_CHECKING:
    from layerwise.run.checkpoints.storage import Checkpoint

NAMES_SHOWN = 3
# layers that predict later tokens: by their own name, or by the matrix that joins the
# hidden state and the embedding of the next token
PREDICTION = re.compile(r"(^|\.)mtp(_|\.)")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
JOINT = ".eh_proj."
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")


@dataclass(frozen=True)
class Account:
    """Places of the tensors of a checkpoint in a model.

    Parameters
    ----------
    names
        Stored tensor of every parameter and stored buffer that is loaded as it is, tied
        parameters included.
    converted
        Stored tensors of every parameter that is computed from them.
    left_out
        Stored tensors that are not part of the model and need not be: those that
        transformers declares, and layers that predict later tokens.
    unplaced
        Stored tensors that have no place in the model.
    doubled
        Stored tensors whose place another stored tensor takes, by another name.
    missing
        Parameters without a stored tensor.
    initialized
        Parameters without a stored tensor that transformers gives a value.
    """

    names: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]
    left_out: frozenset[str]
    unplaced: frozenset[str]
    doubled: frozenset[str]
    missing: frozenset[str]
    initialized: frozenset[str]

    @property
    def is_one_to_one(self) -> bool:
        """Whether every parameter is stored as one tensor."""
        return not (self.converted or self.initialized or self.missing)


def account_of(model: nn.Module, checkpoint: Checkpoint) -> Account:
    """Places of the tensors of a checkpoint in a model.

    Parameters
    ----------
    model
        A model of transformers, on any device.
    checkpoint
        The headers.
    """
    rules = _Rules(model)
    names: dict[str, str] = {}
    converted: dict[str, tuple[str, ...]] = {}
    unknown: dict[str, set[str]] = {}  # name after renaming -> stored tensors
    doubled: set[str] = set()
    for stored in rules.in_order(checkpoint.weight_map):
        targets, is_converted = rules.targets(stored)
        for target in targets:
            if target not in rules.state:
                unknown.setdefault(target, set()).add(stored)
            elif target in names or (target in converted and not is_converted):
                doubled.add(stored)
            elif is_converted:
                converted[target] = (*converted.get(target, ()), stored)
            else:
                names[target] = stored
    names = {name: names[name] for name in rules.state if name in names}
    _add_tied(model, names)
    parameters = {name for name, _ in model.named_parameters()}
    missing = parameters - names.keys() - converted.keys()
    required, unexpected = rules.not_ignored(missing, set(unknown))
    unplaced = {stored for target in unexpected for stored in unknown[target]}
    unplaced -= prediction_layers(model, checkpoint.config, unplaced)
    used = {*names.values(), *doubled, *chain.from_iterable(converted.values())}
    return Account(
        names=names,
        converted=converted,
        left_out=frozenset(checkpoint.weight_map.keys() - unplaced - used),
        unplaced=frozenset(unplaced),
        doubled=frozenset(doubled),
        missing=frozenset(required),
        initialized=frozenset(missing - required),
    )


class _Rules:
    """Rules of transformers for the names of one model."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._prefix = getattr(model, "base_model_prefix", None) or None
        of_transformers = hasattr(model, "base_model_prefix")
        rules: list[Any] = get_model_conversion_mapping(model) if of_transformers else []
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.state = model.state_dict()

    def in_order(self, stored: Iterable[str]) -> list[str]:
        """Names in the order in which they are loaded; some rules depend on it."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(stored, key=dot_natural_key)

    def targets(self, stored: str) -> tuple[list[str], bool]:
        """Names in the model that a stored tensor becomes, and whether it is converted."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._prefix, self.state
        name, source = rename_source_key(stored, self._renamings, self._converters, *prefix)
        if name not in self.state and stored in self.state:
            name, source = rename_source_key(stored, [], [], *prefix)
        if source is None:
            return [name], False
        rule = next(rule for rule in self._converters if source in rule.source_patterns)
        first, *others = rule.target_patterns
        return [name, *(name.replace(first, other) for other in others)], True

    def not_ignored(
        self, missing: set[str], unexpected: set[str]
    ) -> tuple[set[str], set[str]]:
        """Names without those that transformers declares ignorable."""
        report = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
        if adjust := getattr(self._model, "_adjust_missing_and_unexpected_keys", None):
            adjust(report)
        return set(report.missing_keys), set(report.unexpected_keys)


def _add_tied(model: nn.Module, names: dict[str, str]) -> None:
    """Give tied parameters the stored tensor of the first of them."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}  # identity of a parameter -> tensor name
    for name, parameter in parameters:
        if name in names:
            first.setdefault(id(parameter), names[name])
    for name, parameter in parameters:
        if id(parameter) in first:
            names.setdefault(name, first[id(parameter)])


def prediction_layers(
    model: Any, stored_config: Mapping[str, Any], names: Iterable[str]
) -> set[str]:
    """Tensors of layers after the last block that predict later tokens.

    Transformers does not have these layers. They are known by their names, or because
    ``config.json`` counts them.
    """
    names = set(names)
    ahead = {name for name in names if PREDICTION.search(name)}
    config = getattr(model, "config", None)
    blocks = getattr(config and config.get_text_config(), "num_hidden_layers", None)
    if blocks is None:
        return ahead
    layers: dict[int, set[str]] = {}
    for name in names:
        if (number := LAYER.search(name)) and int(number[1]) >= blocks:
            layers.setdefault(int(number[1]), set()).add(name)
    nested = stored_config.get("text_config")
    sections = [stored_config, nested if isinstance(nested, dict) else {}]
    counts = [section.get(name) for section in sections for name in COUNTS]
    counted = max((count for count in counts if isinstance(count, int)), default=0)
    for index, layer in layers.items():
        if index < blocks + counted or any(JOINT in name for name in layer):
            ahead |= layer
    return ahead


def checkpoint_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name of the stored tensor of each parameter of a model.

    Returns
    -------
    dict
        One entry per parameter name, tied parameters included. Parameters without a
        stored tensor of their own (such as those that transformers fuses while loading)
        are absent.
    """
    names = account_of(model, checkpoint).names
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name: names[name] for name in parameters if name in names}


def remarks(
    model: nn.Module, checkpoint: Checkpoint, *, are_kept: bool = True
) -> Iterator[str]:
    """Remarks on stored tensors that are not part of the model.

    Parameters
    ----------
    model, checkpoint
        The model and its folder.
    are_kept
        Whether the run copies them to its output.
    """
    if left_out := account_of(model, checkpoint).left_out:
        fate = "kept byte for byte" if are_kept else "left out of the smaller model"
        yield (
            f"not part of the model that transformers opens, and {fate}: {listed(left_out)}"
        )


def listed(names: Iterable[str]) -> str:
    """Some of the names, and the number of the others."""
    shown = sorted(names)
    more = f" and {len(shown) - NAMES_SHOWN} more" * (len(shown) > NAMES_SHOWN)
    return f"{', '.join(shown[:NAMES_SHOWN])}{more}"


def refuse_mismatch(checkpoint: Checkpoint, problem: str, names: Iterable[str]) -> None:
    """Raise an error that lists some of the names, if there are any."""
    if names := set(names):
        message = (
            f"{checkpoint.path} {problem}: {listed(names)}; config.json does not fit the "
            f"weights, or the download is incomplete: download it again"
        )
        raise DataError(message)
