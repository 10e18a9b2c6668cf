"""The demonstration: packaged trained models, pruned by several methods, compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerwise.demo import MODELS, calibration_text, evaluation_text, model_path
from layerwise.patterns import parse_pattern
from layerwise.run.perplexity import perplexity
from layerwise.run.prune import prune_model
from layerwise.run.report import MethodResult
from layerwise.run.settings import embedding_rows
from layerwise.run.storage import Checkpoint
from layerwise.run.tokens import encode
from layerwise.solvers import SOLVERS

MAIN_METHODS = ("magnitude", "wanda", "sparsegpt", "wanda+least-squares", "fista")
PATTERNS = ("0.5", "2:4")
N_SEQUENCES = 64
EVALUATION_TOKENS = 32768  # of the held-out text


@dataclass(frozen=True)
class Comparison:
    """Results of the demonstration.

    Parameters
    ----------
    results
        One per model, pattern and method.
    dense_perplexity
        Of every model before pruning.
    """

    results: tuple[MethodResult, ...]
    dense_perplexity: dict[str, float]


def all_methods() -> tuple[str, ...]:
    """Every solver; those that only refit follow Wanda's mask."""
    names = [
        f"wanda+{name}" if "mask" in make().requires else name
        for name, make in SOLVERS.items()
    ]
    return tuple(dict.fromkeys([*MAIN_METHODS, *names]))


def compare(
    models: Sequence[str],
    methods: Sequence[str],
    patterns: Sequence[str] = PATTERNS,
    on_result: Callable[[MethodResult, float], None] = lambda result, dense: None,
) -> Comparison:
    """Prune packaged models by every method and measure error and perplexity.

    Parameters
    ----------
    models
        Names of packaged models.
    methods
        Method names, chains included.
    patterns
        Patterns as on the command line.
    on_result
        Called with every result and the dense perplexity of its model.
    """
    results: list[MethodResult] = []
    dense: dict[str, float] = {}
    for name in models:
        checkpoint = Checkpoint.open(model_path(name))
        tokenizer = checkpoint.load_tokenizer()
        assert tokenizer is not None  # every packaged model has one
        model = checkpoint.load_model()
        rows = embedding_rows(model)
        calibration = encode(calibration_text(), tokenizer, rows)
        tokens = encode(evaluation_text(), tokenizer, rows)[:EVALUATION_TOKENS]
        dense[name] = _perplexity(model, tokens)
        for pattern in patterns:
            for method in methods:
                result = _prune_once(checkpoint, name, method, pattern, calibration, tokens)
                results.append(result)
                on_result(result, dense[name])
    return Comparison(tuple(results), dense)


def _prune_once(
    checkpoint: Checkpoint,
    name: str,
    method: str,
    pattern: str,
    calibration: Tensor,
    tokens: Tensor,
) -> MethodResult:
    report = prune_model(
        checkpoint.load_model(),
        method,
        pattern=parse_pattern(pattern),
        calibration=calibration,
        n_sequences=N_SEQUENCES,
        sequence_length=256,
    )
    return MethodResult(
        model=name,
        method=method,
        pattern=pattern,
        perplexity=_perplexity(report.model, tokens),
        mean_relative_error=report.mean_relative_error,
        seconds=report.seconds,
        records=report.records,
    )


def _perplexity(model: Any, tokens: Tensor) -> float:
    return perplexity(model, tokens, sequence_length=256)


def demo_models(everything: bool) -> tuple[str, ...]:
    """LLaMA alone, or all packaged models."""
    return MODELS if everything else ("llama",)
