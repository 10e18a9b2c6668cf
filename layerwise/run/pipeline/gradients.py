"""Loss gradients of the dense model: one backward pass per calibration sequence.

Every sequence gives the gradient of its mean next-token loss. The result is the norm of
these gradients over the sequences: one float32 number per weight, on the CPU, in the norms
and scalings of :mod:`layerwise.solvers.gblm`.

The pass runs on the whole model on its own devices, with the activations of one sequence.
Every gradient is added up and freed as soon as it is computed. The model is not changed.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from layerwise.adapters.linear import is_transposed
from layerwise.errors import SolveError, UsageError
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.steps import counted
from layerwise.solve import steps_of
from layerwise.solver import Solver, requirements

# gradients of 1e-6 are subnormal in float16; its largest number is 65504
FLOAT16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class GradientStatistic:
    """Norm over the sequences, and its scaling."""

    norm: Literal["l1", "l2"] = "l1"
    scaling: Literal["mean", "paper"] = "mean"


def required_gradient(solver: Solver) -> GradientStatistic | None:
    """Statistic that a solver, or a step of a chain, requires; None: no gradients.

    A step requires it by ``"gradient"`` in its `requires`; its fields `norm` and `scaling`
    choose the statistic.
    """
    required = [
        GradientStatistic(getattr(step, "norm", "l1"), getattr(step, "scaling", "mean"))
        for step in steps_of(solver)
        if "gradient" in requirements(step)
    ]
    if len(set(required)) > 1:
        message = (
            "the steps of this chain need different gradients: give them the same norm "
            "and scaling"
        )
        raise UsageError(message)
    return required[0] if required else None


def gradient_norms(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    tokens: Tensor,  # (sequences, length)
    statistic: GradientStatistic,
) -> dict[str, Tensor]:
    """Norms of the loss gradient of some weights of a causal language model.

    Cost: a forward and a backward pass per sequence. Memory: one float32 matrix per
    linear, and the activations of one sequence.

    Parameters
    ----------
    model
        The dense model, on its device.
    linears
        The layers whose gradients are computed, by name.
    tokens
        Token ids, one sequence per row.
    statistic
        Norm and scaling.

    Returns
    -------
    dict of str to Tensor
        For every name a float32 matrix (out, in), on the CPU.

    Raises
    ------
    UsageError
        If a sequence has no next token to predict.
    SolveError
        If a gradient is not finite.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        message = (
            "loss gradients need a model that was not loaded in torch.inference_mode: load "
            "it outside"
        )
        raise UsageError(message)
    count, length = tokens.shape
    if length < 2:
        message = (
            "loss gradients need sequences of at least 2 tokens: raise sequence_length"
        )
        raise UsageError(message)
    weights = {name: linear.get_parameter("weight") for name, linear in linears.items()}
    sums = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    half = any(weight.dtype == torch.float16 for weight in weights.values())
    scale = FLOAT16_LOSS_SCALE if half else 1.0

    def add(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.detach().to("cpu", torch.float32) / scale
        weight.grad = None
        if not bool(torch.isfinite(gradient).all()):
            message = (
                f"{name}: the loss gradient is not finite; load the model in bfloat16 or "
                f"float32, or check its weights"
            )
            raise SolveError(message)
        sums[name] += gradient.abs() if statistic.norm == "l1" else gradient.square()

    with _only_these_learn(model, weights), ExitStack() as hooks:
        for name, weight in weights.items():
            handle = weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda parameter, name=name: add(name, parameter)
            )
            hooks.callback(handle.remove)
        for sequence in counted(tokens, count, f"gradients of {count} sequences"):
            (_next_token_loss(model, sequence) * scale).backward()  # type: ignore[no-untyped-call]
    squared = statistic.norm == "l2"
    paper = statistic.scaling == "paper"
    divisor = count if not paper else length if squared else length**0.5
    norms = {
        name: (total / divisor).sqrt() if squared else total / divisor
        for name, total in sums.items()
    }
    return {
        name: norm.T.contiguous() if is_transposed(linears[name]) else norm
        for name, norm in norms.items()
    }


def _next_token_loss(model: nn.Module, sequence: Tensor) -> Tensor:
    """Mean cross entropy of the predicted tokens of one sequence."""
    sequence = sequence.to(next(model.parameters()).device)
    logits = model(input_ids=sequence[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1].float(), sequence[1:])


@contextmanager
def _only_these_learn(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute gradients of these weights only; restore flags and gradients at the end."""
    parameters = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    learning = {id(weight) for weight in weights.values()}
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in learning)
        with evaluation_mode(model), torch.enable_grad():
            yield
    finally:
        for parameter, (learns, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(learns)
            parameter.grad = gradient
