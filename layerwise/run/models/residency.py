"""Location of the parameters of a model during a run: all in memory, or block by block.

A streamed model is a skeleton (:mod:`layerwise.run.models.skeleton`). The parameters
before the blocks are in memory while the first activations are captured, those of a block
while it is pruned, and no others. The pruned weights of a block must be stored before its
context ends.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from layerwise.adapters.auto import lists_of_blocks
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.accounts import account_of
from layerwise.run.models.headers import is_one_to_one, type_of_all
from layerwise.run.models.loading import bounds, check_finite, quiet_transformers
from layerwise.run.models.native_type import is_native
from layerwise.run.models.skeleton import read_config, skeleton_of
from layerwise.run.steps import counted


class Residency(Protocol):
    """A model, and contexts in which parts of it are in memory."""

    model: Any

    def whole(self) -> AbstractContextManager[None]:
        """Context in which the whole model can be run."""
        ...

    def entrance(self, first: nn.Module) -> AbstractContextManager[None]:
        """Context in which everything up to and including the first block can be run."""
        ...

    def block(self, block: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """Context in which a block is on the device."""
        ...


class InMemory:
    """A model that is in memory as a whole, on its own devices."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Do nothing: the whole model is in memory."""
        yield

    @contextmanager
    def entrance(self, first: nn.Module) -> Iterator[None]:
        """Do nothing: the whole model is in memory."""
        yield

    @contextmanager
    def block(self, block: nn.Module, device: torch.device) -> Iterator[None]:
        """Move a block to the device, and back at the end."""
        home = next(block.parameters()).device
        block.to(device)
        try:
            yield
        finally:
            block.to(home)


class Streamed:
    """A checkpoint with one block at a time in memory; made by :meth:`open`.

    Parameters
    ----------
    checkpoint
        The folder.
    model
        Its skeleton, in the type of the loaded parameters.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self.model = model
        self._checkpoint = checkpoint
        self._stored = account_of(model, checkpoint).names
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        lists = lists_of_blocks(model)
        self._units = {
            id(block): f"{name}.{index}"
            for name, blocks in lists.items()
            for index, block in enumerate(blocks)
        }
        inside = tuple(f"{name}." for name in lists)
        self._around = [name for name in self._empty if not name.startswith(inside)]
        head = model.get_output_embeddings()
        entry = model.get_input_embeddings()
        unused = set()
        if head is not None and head.weight is not entry.weight:
            unused = {id(parameter) for parameter in head.parameters()}
        self._before = [n for n in self._around if id(self._empty[n]) not in unused]

    @classmethod
    def open(cls, checkpoint: Checkpoint, *, trusted: bool = False) -> "Streamed | None":
        """Open a checkpoint as a skeleton, after a check of every tensor.

        Parameters
        ----------
        checkpoint
            The folder.
        trusted
            Whether the tensors have been checked already.

        Returns
        -------
        Streamed or None
            None if some parameter is not stored as one tensor, so that transformers must
            assemble the model.

        Raises
        ------
        DataError, UnsupportedModelError
            As :func:`layerwise.run.models.opening.load_model`.
        """
        if is_native(checkpoint.config):  # its blocks are built first and then cut
            return None
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            config = read_config(checkpoint)
            dtype = type_of_all(checkpoint, config)
            if dtype is None:
                return None
            model = skeleton_of(checkpoint, config, dtype=dtype, buffers=True)
        if not is_one_to_one(checkpoint, model):
            return None
        _read_buffers(checkpoint, model)
        if not trusted:
            names, free = account_of(model, checkpoint).names, bounds(model)
            stored_bounds = {names[name] for name in free if name in names}
            tensors, count = checkpoint.tensors(), len(checkpoint.weight_map)
            for name, tensor in counted(tensors, count, f"checking {count} tensors"):
                is_bound = name in stored_bounds
                check_finite(tensor, name, checkpoint, is_bound=is_bound)
        return cls(checkpoint, model)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Load the parameters around the blocks at once, and every block while it runs."""
        with ExitStack() as stack:
            stack.enter_context(self._present(self._around, torch.device("cpu")))
            for module in self.model.modules():
                if id(module) in self._units:
                    self._load_when_run(stack, module)
            yield

    def _load_when_run(self, stack: ExitStack, block: nn.Module) -> None:
        """Let hooks load a block before it runs and free it afterwards."""
        names = self._names(block)

        def enter(*_: Any) -> None:
            self._fill(names, torch.device("cpu"))

        def leave(*_: Any) -> None:
            self._clear(names)

        stack.callback(block.register_forward_pre_hook(enter).remove)
        after = block.register_forward_hook(leave, always_call=True)
        stack.callback(after.remove)

    @contextmanager
    def entrance(self, first: nn.Module) -> Iterator[None]:
        """Load everything before the blocks, such as embeddings, and the first block.

        Other lists of modules, such as projections of the embeddings, are loaded one by
        one when they run.
        """
        before = [*self._before, *self._names(first)]
        with ExitStack() as stack:
            stack.enter_context(self._present(before, torch.device("cpu")))
            for module in self.model.modules():
                if id(module) in self._units and self._list(module) != self._list(first):
                    self._load_when_run(stack, module)
            yield

    @contextmanager
    def block(self, block: nn.Module, device: torch.device) -> Iterator[None]:
        """Load a block onto the device, and free it at the end."""
        with self._present(self._names(block), device):
            _move_buffers(block, device)
            yield
        _move_buffers(block, torch.device("cpu"))

    def _list(self, block: nn.Module) -> str:
        """Name of the list of modules that holds a block."""
        return self._units[id(block)].rpartition(".")[0]

    def _names(self, block: nn.Module) -> list[str]:
        prefix = f"{self._units[id(block)]}."
        return [name for name in self._empty if name.startswith(prefix)]

    @contextmanager
    def _present(self, names: list[str], device: torch.device) -> Iterator[None]:
        self._fill(names, device)
        try:
            yield
        finally:
            self._clear(names)

    def _fill(self, names: list[str], device: torch.device) -> None:
        tied: dict[int, list[str]] = {}
        for name in names:
            tied.setdefault(id(self._empty[name]), []).append(name)
        places = {self._stored[several[0]]: several for several in tied.values()}
        for stored, tensor in self._checkpoint.tensors(places):
            empty = self._empty[places[stored][0]]
            # a copy: a mapped tensor would change with the file
            value = tensor.to(device, empty.dtype, copy=True)
            full = nn.Parameter(value, requires_grad=empty.requires_grad)
            for name in places[stored]:
                _put(self.model, name, full)

    def _clear(self, names: list[str]) -> None:
        for name in names:
            _put(self.model, name, self._empty[name])


def _read_buffers(checkpoint: Checkpoint, model: Any) -> None:
    """Read the values of all buffers that are stored."""
    names = account_of(model, checkpoint).names
    buffers = {
        names[name]: buffer for name, buffer in model.named_buffers() if name in names
    }
    for stored, tensor in checkpoint.tensors(buffers):
        buffers[stored].copy_(tensor)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._parameters[own] = parameter


def _move_buffers(block: nn.Module, device: torch.device) -> None:
    for module in block.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
