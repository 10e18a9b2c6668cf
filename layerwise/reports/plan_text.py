"""A plan as tables on a terminal, and as plain lines elsewhere."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from layerwise.planning.advice import in_units
from layerwise.planning.estimate import total_seconds
from layerwise.planning.memory_model import Instant, MemoryKind, gram_bytes
from layerwise.planning.plan_result import Plan

GAP = "  "


@dataclass(frozen=True)
class Section:
    """A heading with a table below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_plan(plan: Plan) -> None:
    """Print all sections and notes, without the reason of a refusal."""
    console = Console()
    for section in sections(plan):
        if console.is_terminal:
            console.print(_table(section))
        else:
            sys.stdout.write("\n".join(lines(section)) + "\n")
    for note in (*summary(plan), *plan.notes):
        if console.is_terminal:
            console.print(note, highlight=False)
        else:
            sys.stdout.write(f"{note}\n")


def sections(plan: Plan) -> Iterator[Section]:
    """Sections on the weights, memory, disk and time."""
    yield Section(
        f"{plan.model}: {plan.method}, {plan.pattern}, error correction "
        f"{plan.error_correction}, {plan.n_sequences} x {plan.length} tokens",
        ("weights", "shape", "status", "zeros", "reason"),
        tuple(
            (
                f"{group.count} x {group.name}",
                "x".join(map(str, group.shape)),
                group.status,
                f"{group.zeros:,}" if group.zeros else "",
                group.reason,
            )
            for group in plan.groups
        ),
    )
    kinds: list[MemoryKind] = ["host"] if plan.device == "cpu" else ["host", "device"]
    for kind in kinds:
        yield _memory(plan, kind)
    yield Section(
        f"disk: {in_units(sum(plan.disk.values()))}" + _free(plan.capacity.disk),
        ("item", "size"),
        tuple((name, in_units(size)) for name, size in plan.disk.items()),
    )
    yield _time(plan)


def _memory(plan: Plan, kind: MemoryKind) -> Section:
    """The items of the largest moment, then the totals of the other moments."""
    peak = plan.memory.peak(kind)
    free = plan.capacity.host if kind == "host" else plan.capacity.device
    rows = [
        (item.name, in_units(item.bytes))
        for item in sorted(peak.items, key=lambda item: -item.bytes)
        if item.kind == kind
    ]
    others = [moment for moment in plan.memory.instants if moment is not peak]
    rows += [_instant(moment, kind) for moment in others]
    return Section(
        f"{kind} memory: {in_units(peak.total(kind))} at its peak, {peak.name}"
        + _free(free),
        ("item", "size"),
        tuple(rows),
    )


def _instant(moment: Instant, kind: MemoryKind) -> tuple[str, str]:
    return f"(at another moment, {moment.name})", in_units(moment.total(kind))


def _free(size: int | None) -> str:
    return "" if size is None else f" ({in_units(size)} free)"


def _time(plan: Plan) -> Section:
    rows = []
    for stage in plan.stages:
        seconds = "unknown" if stage.seconds is None else in_time(stage.seconds)
        flops = stage.work.total_flops
        rows.append(
            (
                stage.stage,
                f"{flops / 1e9:,.1f}" if flops else "",
                f"{stage.work.bytes / 1e6:,.1f}" if stage.work.bytes else "",
                in_time(stage.floor) if stage.floor else "",
                seconds,
            )
        )
    known, more = total_seconds(plan.stages)
    floor = sum(stage.floor for stage in plan.stages)
    prefix = "more than " if more else ""
    rows.append(("all", "", "", in_time(floor), prefix + in_time(known)))
    return Section(
        f"time on {plan.device}",
        ("stage", "GFLOP", "MB", "floor", "expected"),
        tuple(rows),
    )


def summary(plan: Plan) -> Iterator[str]:
    """Sparsity, the largest gram, and the measured rates of the floors."""
    share = plan.zeros / plan.pruned if plan.pruned else 0.0
    yield (
        f"{plan.zeros:,} zeros: {share:.4%} of the {plan.pruned:,} pruned weights "
        f"(requested: {plan.pattern}), {plan.zeros / plan.parameters:.4%} of all "
        f"{plan.parameters:,} parameters"
    )
    widest = plan.sizes.widest
    if widest is not None:
        pruned = [group for group in plan.groups if group.status == "pruned"]
        name = next(g.name for g in pruned if g.shape[1] == widest.width)
        yield (
            f"largest gram: {widest.width} x {widest.width}, "
            f"{in_units(gram_bytes(widest.width))}, of {name}"
        )
    where = "files" if plan.on_disk else "memory"
    yield f"hidden states between the blocks: {where}"
    rates = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {rate / 1e9:,.0f} GFLOP/s"
        for dtype, rate in plan.gemm_rates.items()
    )
    yield f"measured here: {rates}, copy {plan.copy_rate / 1e9:,.1f} GB/s"


def in_time(seconds: float) -> str:
    """Seconds, minutes or hours, with three significant digits."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h"


def lines(section: Section) -> list[str]:
    """Lines with aligned columns; no line is wrapped."""
    rows = [section.columns, *section.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(section.columns))]
    text = [section.title]
    for row in rows:
        cells = [
            cell.ljust(width) if _is_text(column) else cell.rjust(width)
            for cell, width, column in zip(row, widths, section.columns, strict=True)
        ]
        text.append(GAP + GAP.join(cells).rstrip())
    return [*text, ""]


def _is_text(column: str) -> bool:
    return column in ("weights", "item", "stage", "status", "reason")


def _table(section: Section) -> Table:
    table = Table(
        title=section.title,
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for column in section.columns:
        table.add_column(column, justify="left" if _is_text(column) else "right")
    for row in section.rows:
        table.add_row(*row)
    return table
