"""Tables on the terminal: solvers, the demonstration, tasks, speed, stages, races."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from layerwise.experiments.demo import Comparison
from layerwise.grams.sweep import Sweep
from layerwise.reports.catalogue import Entry
from layerwise.run.data.tasks import TaskScores
from layerwise.run.pipeline.records import in_percent
from layerwise.timing.bench import Bench
from layerwise.timing.race import Race
from layerwise.timing.speed import Speed


def print_solvers(entries: Sequence[Entry]) -> None:
    """One line per method."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "patterns", "needs", "guarantee", "what it does"):
        table.add_column(heading, no_wrap=heading == "name")
    for entry in entries:
        table.add_row(
            entry.name, entry.patterns, entry.needs, entry.guarantee, entry.summary
        )
    _console().print(table)


def print_comparison(comparison: Comparison) -> None:
    """One table per model, a section per pattern."""
    for model, dense in comparison.dense_perplexity.items():
        table = Table(title=f"{model}: dense perplexity {dense:.3f}", title_justify="left")
        table.add_column("pattern")
        table.add_column("method")
        for heading in ("perplexity", "mean relative error", "seconds"):
            table.add_column(heading, justify="right")
        results = [result for result in comparison.results if result.model == model]
        for index, result in enumerate(results):
            last = index + 1 == len(results) or results[index + 1].pattern != result.pattern
            table.add_row(
                result.pattern,
                result.method,
                f"{result.perplexity:.3f}",
                f"{result.mean_relative_error:.4f}",
                f"{result.seconds:.1f}",
                end_section=last,
            )
        _console().print(table)


def print_scores(found: TaskScores) -> None:
    """One line per metric of a task."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in ("score", "standard error", "examples", "shots"):
        table.add_column(heading, justify="right")
    for index, score in enumerate(found.scores):
        again = index > 0 and found.scores[index - 1].task == score.task
        table.add_row(
            "" if again else score.task,
            score.metric if score.filter == "none" else f"{score.metric} ({score.filter})",
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
            "" if again else str(score.n_examples),
            "" if again else str(score.n_shots),
        )
    _console().print(table)


def print_speed(names: Sequence[str], speeds: Sequence[Speed]) -> None:
    """One line per figure; for two models, with the ratio in favour of the second."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in (*names, *(["ratio"] if len(speeds) == 2 else [])):
        table.add_column(name, justify="right", overflow="fold")
    for heading, cells, ratio in _speed_rows(speeds):
        table.add_row(heading, *cells, *([ratio] if len(speeds) == 2 else []))
    _console().print(table)


def _speed_rows(speeds: Sequence[Speed]) -> list[tuple[str, list[str], str]]:
    """Heading, one cell per model, and the ratio in favour of the last model."""
    first, last = speeds[0], speeds[-1]
    rows = [
        (
            "parameters",
            [f"{speed.parameters:,}" for speed in speeds],
            _factor(first.parameters / last.parameters),
        ),
        (
            "size",
            [_mib(speed.bytes) for speed in speeds],
            _factor(first.bytes / last.bytes),
        ),
    ]
    if first.peak_memory and last.peak_memory:
        cells = [_mib(speed.peak_memory or 0) for speed in speeds]
        ratio = _factor(first.peak_memory / last.peak_memory)
        rows.append(("peak memory", cells, ratio))
    for batch in first.prefill:
        timings = [speed.prefill[batch] for speed in speeds]
        faster = _factor(timings[0].speedup(timings[-1]))
        heading = f"prefill {batch} x {first.length}"
        rows.append((heading, [f"{1e3 * t.latency:.2f} ms" for t in timings], faster))
        rows.append(("", [f"{t.tokens_per_second:,.0f} tokens/s" for t in timings], ""))
    decodes = [speed.decode for speed in speeds]
    cells = [f"{decode.tokens_per_second:,.1f} tokens/s" for decode in decodes]
    rows.append(("decode", cells, _factor(decodes[0].speedup(decodes[-1]))))
    return rows


def print_bench(bench: Bench) -> None:
    """One line per stage: seconds, share, counted work, floor and their ratio."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("stage")
    for heading in ("seconds", "share", "GFLOP", "MB", "floor", "ratio"):
        table.add_column(heading, justify="right")
    total = bench.seconds
    for stage in bench.stages:
        table.add_row(
            stage.stage,
            f"{stage.seconds:.3f}",
            f"{stage.seconds / total:.1%}",
            _count(stage.work.total_flops / 1e9),
            _count(stage.work.bytes / 1e6),
            f"{stage.floor:.3f}" if stage.floor else "",
            "" if stage.ratio is None else _factor(stage.ratio),
        )
    table.add_row("all", f"{total:.3f}", end_section=True)
    console = _console()
    console.print(bench.title, highlight=False)
    console.print(table)
    names = {str(t).removeprefix("torch."): rate for t, rate in bench.gemm_rates.items()}
    console.print(_measured(names, bench.copy_rate), highlight=False)


def print_race(race: Race) -> None:
    """One line per method, a section per layer."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer")
    table.add_column("method")
    headings = ["seconds", "iterations", "matmul", "bandwidth", "error", "certificate"]
    gaps = any(lap.gap is not None for lap in race.laps)
    for heading in (*headings, *(["gap"] if gaps else [])):
        table.add_column(heading, justify="right")
    for index, lap in enumerate(race.laps):
        again = index > 0 and race.laps[index - 1].layer == lap.layer
        proof = lap.certificate
        table.add_row(
            "" if again else f"{lap.layer} ({lap.rows} x {lap.width})",
            lap.method,
            f"{lap.seconds:.3f}",
            str(lap.iterations or ""),
            f"{lap.matmul_share:.1%}",
            f"{lap.bandwidth_share:.1%}",
            f"{lap.relative_error:.4f}",
            "" if proof is None else f"{proof['kind']} {proof['bound']:.1e}",
            *([] if lap.gap is None else [f"{lap.gap:.1%}"]),
        )
    console = _console()
    console.print(race.title, highlight=False)
    console.print(table)
    console.print(_measured(race.gemm_rates, race.copy_rate), highlight=False)


def print_sweep(sweep: Sweep) -> None:
    """One line per method and sparsity, a section per method."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    table.add_column("sparsity")
    rows = sweep.rows()
    gaps = any(row.median_proven_gap is not None for row in rows)
    headings = ["layers", "mean error", "median error", "seconds"]
    for heading in (*headings, *(["proven within"] if gaps else [])):
        table.add_column(heading, justify="right")
    for index, row in enumerate(rows):
        again = index > 0 and rows[index - 1].method == row.method
        gap = row.median_proven_gap
        table.add_row(
            "" if again else row.method,
            row.pattern,
            str(row.n_layers),
            f"{row.mean_relative_error:.4f}",
            f"{row.median_relative_error:.4f}",
            f"{row.seconds:.2f}",
            *([] if not gaps else ["" if gap is None else in_percent(gap)]),
        )
    _console().print(table)


def _measured(gemm_rates: Mapping[str, float], copy_rate: float) -> str:
    rates = [f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in gemm_rates.items()]
    return f"measured: {', '.join(rates)}, copy {copy_rate / 1e9:.3g} GB/s"


def _factor(value: float) -> str:
    return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def _count(value: float) -> str:
    return f"{value:,.2f}" if value else ""


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _console() -> Console:
    """Console of the terminal, or of a fixed width for pipes and files."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
