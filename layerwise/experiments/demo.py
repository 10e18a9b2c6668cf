"""The demonstration: prune packaged models by several methods, and compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerwise.demo import MODELS
from layerwise.experiments.experiment import DENSE, Experiment, PackagedModel
from layerwise.experiments.results import MethodResult, ResultStore
from layerwise.run.channels.structure import prunes_columns_only
from layerwise.run.pipeline.records import LayerRecord
from layerwise.solver import requirements
from layerwise.solvers import SOLVERS

MAIN_METHODS = ("magnitude", "wanda", "sparsegpt", "wanda+least-squares", "fista")
PATTERNS = ("0.5", "2:4")
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Refusal:
    """An experiment that a method refused, and the reason."""

    experiment: Experiment
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Results of the demonstration.

    Parameters
    ----------
    results
        One result per model, pattern and method.
    dense_perplexity
        Perplexity of every model before pruning.
    refused
        Experiments that a method does not support, for example because of the pattern.
    """

    results: tuple[MethodResult, ...]
    dense_perplexity: dict[str, float]
    refused: tuple[Refusal, ...]


def all_methods() -> tuple[str, ...]:
    """Every solver of single weights once; solvers that only refit use Wanda's mask."""
    sparse = {n: make for n, make in SOLVERS.items() if not prunes_columns_only(make())}
    names = {_without_name(make()): name for name, make in reversed([*sparse.items()])}
    methods = [
        f"wanda+{name}" if "mask" in requirements(SOLVERS[name]()) else name
        for name in reversed([*names.values()])
    ]
    return tuple(dict.fromkeys([*MAIN_METHODS, *methods]))


def _without_name(solver: Any) -> Any:
    """Solver without its name, so that two names of the same solver are equal."""
    return replace(solver, name="")


def compare(
    models: Sequence[str],
    methods: Sequence[str],
    patterns: Sequence[str] = PATTERNS,
    on_result: Callable[[MethodResult, float], None] = lambda result, dense: None,
    store: ResultStore | None = None,
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
    store
        Store for finished results; stored results are not computed again.
    """
    store = ResultStore() if store is None else store
    results: list[MethodResult] = []
    dense: dict[str, float] = {}
    refused = []
    for name in models:
        packaged = PackagedModel(name)
        dense[name] = _answer(store, packaged, Experiment(name, DENSE))["perplexity"]
        for pattern in patterns:
            for method in methods:
                experiment = Experiment(name, method, pattern)
                answer = _answer(store, packaged, experiment)
                if "refused" in answer:
                    refused.append(Refusal(experiment, answer["refused"]))
                    continue
                results.append(_result(experiment, answer))
                on_result(results[-1], dense[name])
    return Comparison(tuple(results), dense, tuple(refused))


def _answer(
    store: ResultStore, packaged: PackagedModel, experiment: Experiment
) -> dict[str, Any]:
    """Answer from the store, or a new one, which is added to the store."""
    task, fingerprint = experiment.to_dict(), packaged.fingerprint(experiment.method)
    answer = store.find(task, fingerprint)
    if answer is None:
        answer = packaged.answer(experiment)
        store.add(task, fingerprint, answer)
    return answer


def _result(experiment: Experiment, answer: dict[str, Any]) -> MethodResult:
    return MethodResult(
        model=experiment.model,
        method=experiment.method,
        pattern=experiment.pattern,
        perplexity=answer["perplexity"],
        mean_relative_error=answer["mean_relative_error"],
        seconds=answer["seconds"],
        records=tuple(LayerRecord.from_dict(record) for record in answer["records"]),
    )


def demo_models(everything: bool) -> tuple[str, ...]:
    """LLaMA alone, or all packaged models."""
    return MODELS if everything else ("llama",)
