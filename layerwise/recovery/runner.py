"""Runs a retraining, block by block or of the whole model, with journal and callbacks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerwise.errors import DataError, UsageError
from layerwise.recovery.next_token import retrain_tokens
from layerwise.recovery.pruned import Pruned
from layerwise.recovery.reconstruct import (
    Pair,
    Reconstruction,
    RetrainedBlock,
    reconstruct_block,
)
from layerwise.recovery.records import UnitRecord, unit_records
from layerwise.recovery.states import pack, unpack
from layerwise.recovery.trainable import ParameterSets
from layerwise.recovery.training import State, Training
from layerwise.recovery.units import count_units
from layerwise.run.activations.streams import block_outputs, capture, evaluation_mode
from layerwise.run.pipeline.store import StateStore
from layerwise.run.steps import status

TRAINING = "training"  # name of the training state in the journal


class Callback(Protocol):
    """Called as a retraining progresses.

    A callback may also have these methods: ``on_note(text)`` gets lines for the log,
    ``on_status(text)`` what is done now, for a status line.
    """

    def on_start(self, total: int, per_unit: int) -> None:
        """All checks passed; at most so many updates follow, in total and per unit."""

    def on_step(self, learning_rate: float, step: int, loss: float) -> None:
        """One update is done."""

    def on_unit(self, record: UnitRecord) -> None:
        """A unit is done, now or by the interrupted run that is resumed."""

    def on_finish(self, report: Any) -> None:
        """The retraining is finished and saved; `report` is a `RetrainReport`."""


def tell(callbacks: Sequence[Callback], method: str, text: str) -> None:
    """Call an optional method of the callbacks that have it."""
    for callback in callbacks:
        if (on_text := getattr(callback, method, None)) is not None:
            on_text(text)


class Runner:
    """Runs a retraining on a pruned model.

    Parameters
    ----------
    pruned
        The model and its masks.
    batches
        Token ids, each (sequences, length).
    device
        Where to compute.
    store
        Keeps finished blocks and training states.
    listeners
        Callbacks.
    """

    def __init__(
        self,
        pruned: Pruned,
        batches: Sequence[Tensor],
        device: torch.device,
        store: StateStore,
        listeners: Sequence[Callback],
    ) -> None:
        self._pruned, self._batches, self._device = pruned, batches, device
        self._store, self._listeners = store, listeners

    def tokens(
        self, sets: ParameterSets, training: Training, checkpointing: bool
    ) -> tuple[dict[str, Tensor], list[UnitRecord]]:
        """Train the whole model on its next-token loss."""
        model = self._pruned.model
        self._start(1, training)
        stored = self._store.read_state(TRAINING)
        status("retraining the model")
        home = next(model.parameters()).device
        model.to(self._device)
        blocks = list(self._pruned.blocks.values())
        values, record = retrain_tokens(
            model,
            sets,
            self._pruned.masks,
            self._batches,
            training,
            blocks=blocks if checkpointing else (),
            state=unpack(*stored) if stored else None,
            save=self._save,
            on_step=self._step,
        )
        model.to(home)
        self._unit(record)
        return values, [record]

    def _save(self, state: State) -> None:
        self._store.write_state(TRAINING, *pack(state))

    def blocks(
        self, task: Reconstruction, dense: Any
    ) -> tuple[dict[str, Tensor], list[UnitRecord]]:
        """Reconstruct block after block, or take a block from the store."""
        adapter, model = self._pruned.adapter, self._pruned.model
        blocks, originals = self._pruned.blocks, adapter.blocks_of(dense)
        if blocks.keys() != originals.keys():
            message = (
                f"the dense model has {len(originals)} blocks but the pruned one has "
                f"{len(blocks)}: give the model that was pruned"
            )
            raise UsageError(message)
        with evaluation_mode(model), evaluation_mode(dense):
            return self._reconstruct(task, blocks, originals, dense)

    def _reconstruct(
        self,
        task: Reconstruction,
        blocks: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
        dense: nn.Module,
    ) -> tuple[dict[str, Tensor], list[UnitRecord]]:
        """Reconstruct the blocks in order."""
        adapter, model = self._pruned.adapter, self._pruned.model
        stream = capture(model, list(blocks.values()), self._batches)
        hidden: Sequence[Tensor] = stream.hidden
        dense_hidden = hidden
        if task.mode == "full":
            dense_hidden = capture(dense, list(originals.values()), self._batches).hidden
        units = [count_units(adapter.stages_of(name), task.objective) for name in blocks]
        self._start(sum(units), task.training)
        values: dict[str, Tensor] = {}
        records: list[UnitRecord] = []
        for index, (name, block) in enumerate(blocks.items()):
            original, calls = originals[name], stream.calls[index]
            homes = [next(module.parameters()).device for module in (block, original)]
            block.to(self._device)
            original.to(self._device)
            prefix = f"{name}."
            pair = Pair(
                name=name,
                block=block,
                dense=original,
                stages=adapter.stages_of(name),
                masks={
                    n.removeprefix(prefix): mask
                    for n, mask in self._pruned.masks.items()
                    if n.startswith(prefix)
                },
                calls=calls,
                inputs=hidden,
                dense_inputs=hidden if task.mode == "sequential" else dense_hidden,
            )
            status(f"retraining {name}")
            retrained = self._block(index, task, pair)
            status(f"passing the tokens through {name}")
            values |= {prefix + n: value for n, value in retrained.values.items()}
            records += retrained.records
            if index < len(blocks) - 1:
                if task.mode == "full":
                    outputs = block_outputs(original, calls, dense_hidden, self._device)
                    dense_hidden = list(outputs)
                hidden = list(block_outputs(block, calls, hidden, self._device))
            for module, home in zip((block, original), homes, strict=True):
                module.to(home)
        return values, records

    def _block(self, index: int, task: Reconstruction, pair: Pair) -> RetrainedBlock:
        state = f"{index:05d}"
        stored = self._store.read_state(state)
        if stored is not None:
            tensors, text = stored
            records = unit_records(text)
            retrained = RetrainedBlock(tensors, records)
            _refuse_misfits(pair, tensors)
            with torch.no_grad():
                for name, value in retrained.values.items():
                    pair.block.get_parameter(name).copy_(value)
            for record in records:
                self._unit(record)
            return retrained
        retrained = reconstruct_block(task, pair, self._step, self._unit)
        text = json.dumps([record.to_dict() for record in retrained.records])
        self._store.write_state(state, retrained.values, text)
        return retrained

    def _start(self, units: int, training: Training) -> None:
        per_unit = training.steps * len(training.learning_rates)
        for listener in self._listeners:
            listener.on_start(units * per_unit, per_unit)

    def _step(self, rate: float, step: int, loss: float) -> None:
        for listener in self._listeners:
            listener.on_step(rate, step, loss)

    def _unit(self, record: UnitRecord) -> None:
        for listener in self._listeners:
            listener.on_unit(record)


def _refuse_misfits(pair: Pair, values: Mapping[str, Tensor]) -> None:
    """Refuse stored values that this block, with its masks, cannot have."""
    own = dict(pair.block.named_parameters())
    for name, value in values.items():
        fits = name in own and own[name].shape == value.shape
        if fits and name in pair.masks:
            fits = not bool((value[~pair.masks[name]] != 0).any())
        if not fits or not bool(torch.isfinite(value).all()):
            message = (
                f"the stored {name} does not fit {pair.name} of the pruned model: start "
                f"over with --no-resume (resume=False)"
            )
            raise DataError(message)
