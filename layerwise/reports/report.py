"""Reports: one self-contained HTML page about a run, or about a comparison of methods.

A page makes no request and runs no script: styles and plots are inline, and a content
security policy forbids everything else. All text from outside is escaped.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from layerwise.errors import DataError, UsageError
from layerwise.experiments.results import MethodResult
from layerwise.reports.page import (
    MISSING,
    breakable,
    decimal,
    foldable,
    number,
    page,
    scrollable,
    table,
)
from layerwise.reports.plots import kinds_figure, methods_figure
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.outputs.output import Manifest
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.destination import FOLDER, LAYERS
from layerwise.run.pipeline.journal import read_layers
from layerwise.run.pipeline.records import LayerRecord, in_percent, median_gap

RECIPE = "recipe.yaml"

RELATIVE_ERROR = """is ‖<var>W</var><var>X</var> &minus; <var>Ŵ</var><var>X̂</var>‖ /
‖<var>W</var><var>X</var>‖ on the calibration text, with the weights <var>W</var> before
and <var>Ŵ</var> after pruning, and the inputs of the layer in the dense model,
<var>X</var>, and in the pruned one, <var>X̂</var>. 0: its outputs did not change. 1: the
error is as large as if the layer returned zeros."""

EXPLANATION = f"""<div class="beside">
<p><b>Perplexity</b> is measured on text that was not used for calibration: the model is as
uncertain about the next token as if it guessed among that many. Lower is better. The
increase is relative to the dense model.</p>
<p><b>Relative error</b> of a layer {RELATIVE_ERROR} Every method here tries to keep it
small. The remaining errors add up through the model, so perplexity decides.</p></div>
"""

RUN_EXPLANATION = f"""<div class="beside">
<p><b>Relative error</b> of a layer {RELATIVE_ERROR}</p>
<p><b>Certificates</b> are proven bounds: “refit” on the excess over the best weights with
the same zeros, “l1” on the duality gap of the l1 problem, “support” on the excess over the
best zeros and weights. <b>Marked</b>: damping that had to be raised, inputs of deficient
rank, channels that are always zero.</p></div>
"""

GAP_EXPLANATION = """<p class="soft"><b>Proven gap</b>: the share of the damped objective of
the stored weights that any other zeros and weights could save at most. A large gap does not
mean that the answer is poor.</p>"""

GAP_COLUMN, BEFORE_GAP = "proven gap", "damping"
METHOD_COLUMNS = ("method", "perplexity", "increase %", "mean relative error", "seconds")
LAYER_COLUMNS = (
    "layer",
    "shape",
    "sparsity",
    "relative error",
    "status",
    "certificate",
    "damping",
    "rank / width",
    "dead channels",
    "seconds",
)


def comparison_page(
    results: Sequence[MethodResult], dense_perplexity: Mapping[str, float], command: str
) -> str:
    """Page that compares methods, model by model.

    Parameters
    ----------
    results
        Results in the order of models, patterns and methods on the page.
    dense_perplexity
        Perplexity before pruning, by the name of the model.
    command
        Command that repeats the comparison.

    Raises
    ------
    UsageError
        There is nothing to show, a dense perplexity is missing, or matplotlib is.
    """
    if not results:
        message = "no results to report: compare at least one method"
        raise UsageError(message)
    models = list(dict.fromkeys(result.model for result in results))
    unknown = [model for model in models if model not in dense_perplexity]
    if unknown:
        message = f"no dense perplexity for {', '.join(unknown)}: measure it first"
        raise UsageError(message)
    body = [
        "<h1>Pruning methods compared</h1>",
        f'<p class="soft">Made by <code>{escape(command)}</code></p>',
        EXPLANATION,
    ]
    if len(models) > 1:
        links = (
            f'<a href="#m{index}">{breakable(model)}</a>'
            for index, model in enumerate(models)
        )
        body.append(f"<nav>{' '.join(links)}</nav>")
    for index, model in enumerate(models):
        own = [result for result in results if result.model == model]
        body.append(_model_section(own, dense_perplexity[model], f"m{index}"))
    return page("Pruning methods compared", "\n".join(body))


def _model_section(results: Sequence[MethodResult], dense: float, key: str) -> str:
    model = results[0].model
    patterns: dict[str, list[MethodResult]] = {}
    for result in results:
        patterns.setdefault(result.pattern, []).append(result)
    numeric = [False] + [True] * (len(METHOD_COLUMNS) - 1)
    bodies = "\n".join(_pattern_rows(own, dense) for own in patterns.values())
    figures = "\n".join(
        f"<section><h3>Relative error by layer, {escape(_describe(pattern))}</h3>\n"
        f"{methods_figure({r.method: r.records for r in own}, f'{key}p{index}')}</section>"
        for index, (pattern, own) in enumerate(patterns.items())
    )
    return f"""<section id="{key}"><h2>{breakable(model)}</h2>
<p>Dense perplexity <b class="figure">{decimal(dense, 2)}</b>.
<span class="soft">Marked: the best value of a column for one pattern.</span></p>
{scrollable(f"results of {model}", table(METHOD_COLUMNS, numeric, bodies))}
<div class="plots">{figures}</div></section>"""


def _pattern_rows(results: Sequence[MethodResult], dense: float) -> str:
    """Table body with the results of one pattern; the best of each column is marked."""
    columns = [
        _marked([r.perplexity for r in results], lambda value: decimal(value, 2)),
        _marked([100 * (r.perplexity / dense - 1) for r in results], _signed),
        _marked([r.mean_relative_error for r in results], lambda value: decimal(value, 4)),
        _marked([r.seconds for r in results], lambda value: f"{value:.2f}"),
    ]
    names = [f"<code>{breakable(result.method)}</code>" for result in results]
    rows = [
        f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>'
        for name, cells in zip(names, zip(*columns, strict=True), strict=True)
    ]
    title = escape(_describe(results[0].pattern))
    head = f'<tr><th colspan="{len(METHOD_COLUMNS)}" scope="rowgroup">{title}</th></tr>'
    return f"<tbody>{head}\n" + "\n".join(rows) + "</tbody>"


def _marked(values: Sequence[float], show: Callable[[float], str]) -> list[str]:
    """Cells of a column; the smallest value, as shown, is marked if there is a choice."""
    texts = [show(value) for value in values]
    finite = [row for row, value in enumerate(values) if math.isfinite(value)]
    best = texts[min(finite, key=values.__getitem__)] if finite and len(texts) > 1 else ""
    return [number(text, "best" if text == best else "") for text in texts]


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + decimal(value, 2)


def _describe(pattern: str) -> str:
    """Pattern in words, or unchanged if it has no known form."""
    if kept := re.fullmatch(r"(\d+):(\d+)", pattern):
        return f"{pattern} ({kept[1]} of every {kept[2]} weights kept)"
    if fraction := re.fullmatch(r"(0?\.\d+)(.*)", pattern):
        return f"{100 * float(fraction[1]):g} % zeros{fraction[2]}"
    return pattern


def run_page(folder: Path) -> str:
    """Page about a finished run: summary, plot, every layer, recipe, data.

    Raises
    ------
    DataError
        The folder is not an output of layerwise, or is damaged.
    VerificationError
        Its figures or its recipe were changed.
    UsageError
        Matplotlib is missing.
    """
    manifest = Manifest.read(folder)
    manifest.refuse_changed(folder, [f"{FOLDER}/{LAYERS}", RECIPE])
    records = read_layers(folder)
    recipe = Recipe.read(folder / RECIPE)
    if not records:
        message = f"{folder / FOLDER / LAYERS} lists no layer: prune the model again"
        raise DataError(message)
    model = recipe.model or folder.absolute().name
    columns: list[str] = list(LAYER_COLUMNS)
    if proven := median_gap(records) is not None:
        columns.insert(columns.index(BEFORE_GAP), GAP_COLUMN)
    numeric = [column not in ("layer", "status") for column in columns]
    rows = "\n".join(_layer_row(record, proven) for record in records)
    layers = table(columns, numeric, f"<tbody>{rows}</tbody>")
    recipe_box = scrollable("recipe", f"<pre>{escape(recipe.to_yaml())}</pre>")
    body = f"""<h1>{breakable(model)}</h1>
<p class="soft">Pruned by <code>{breakable(recipe.method)}</code>,
{escape(_sparsity(manifest))}</p>
<div class="beside"><section><h2>Summary</h2>
<dl>{_summary(manifest, recipe, records)}</dl></section>
<section><h2>Relative error by block</h2>
{kinds_figure(records, "plot")}</section></div>
<h2>Layers</h2>
{RUN_EXPLANATION}
{GAP_EXPLANATION if proven else ""}
{_retrained(manifest)}
{scrollable("figures of every layer", layers)}
<h2>Recipe</h2>
{recipe_box}
<p class="soft">The element <code>data</code> of this page holds the figures of every layer
as JSON.</p>
<script type="application/json" id="data">{_json(records)}</script>"""
    return page(f"{model}, pruned by {recipe.method}", body)


def _summary(manifest: Manifest, recipe: Recipe, records: Sequence[LayerRecord]) -> str:
    """Terms and descriptions of a definition list."""
    sizes = [math.prod(record.shape) for record in records]
    zeros = sum(n * r.sparsity for n, r in zip(sizes, records, strict=True)) / sum(sizes)
    mean = sum(record.relative_error for record in records) / len(records)
    worst = max(records, key=_badness)
    statuses = Counter(_words(record.status) for record in records)
    tokens = max(record.n_tokens for record in records)
    versions = (f"{name} {version}" for name, version in manifest.versions.items())
    rows = {
        "method": f"<code>{breakable(recipe.method)}</code>",
        "sparsity": f"{escape(_sparsity(manifest))}, {100 * zeros:.2f} % zeros found",
        "pruned": f"{len(records)} layers, {sum(sizes):,} weights",
        "calibration": f"{breakable(manifest.calibration)}, {tokens:,} tokens",
        "error correction": escape(recipe.error_correction),
        "mean relative error": f"<b>{decimal(mean, 4)}</b>",
        "worst relative error": f"{decimal(worst.relative_error, 4)} in "
        f"<code>{breakable(worst.name)}</code>",
        "proven gap": f"median {_gap(median_gap(records))}",
        "status": escape(", ".join(f"{n} {status}" for status, n in statuses.items())),
        "damping raised": _affected(records, lambda record: record.damping_raised),
        "rank deficient": _affected(records, _is_deficient),
        "dead channels": _affected(records, lambda record: record.dead_channels > 0),
        "time in the solver": f"{sum(r.seconds for r in records):,.1f} s",
        "versions": escape(", ".join(versions)),
    }
    if median_gap(records) is None:
        del rows["proven gap"]
    return "\n".join(f"<dt>{term}</dt><dd>{value}</dd>" for term, value in rows.items())


def _retrained(manifest: Manifest) -> str:
    """Note on the tensors that were retrained after the layers were measured."""
    if not manifest.retrained:
        return ""
    count = foldable(f"{len(manifest.retrained)} tensors", manifest.retrained)
    return (
        f'<div class="soft">{count} were retrained after pruning. These errors were '
        f"measured before; <code>layerwise/retraining.jsonl</code> has those after.</div>"
    )


def _sparsity(manifest: Manifest) -> str:
    """Requested sparsity in words, with the group unless the pattern is n:m."""
    described = _describe(manifest.sparsity)
    return described if ":" in described else f"{described} per {manifest.group}"


def _affected(
    records: Sequence[LayerRecord], condition: Callable[[LayerRecord], bool]
) -> str:
    names = [record.name for record in records if condition(record)]
    if not names:
        return "no layer"
    count = f"{len(names)} layer{'s' if len(names) > 1 else ''}"
    return foldable(f"{count} of {len(records)}", names)


def _layer_row(record: LayerRecord, proven: bool) -> str:
    """Row of the table; `proven` if it has a column of proven gaps."""
    rows, width = record.shape
    certificate = MISSING
    if record.certificate is not None:
        certificate = f"{record.certificate_kind} {record.certificate:.1e}"
    cells = [
        f'<th scope="row" class="name"><code>{breakable(record.name)}</code></th>',
        number(f"{rows} \N{MULTIPLICATION SIGN} {width}"),
        number(decimal(record.sparsity, 4)),
        number(decimal(record.relative_error, 4)),
        f"<td>{escape(_words(record.status))}</td>",
        number(certificate),
        *([number(_gap(record.proven_gap))] if proven else []),
        number(f"{record.damping:g}", "warn" if record.damping_raised else ""),
        number(f"{record.rank} / {width}", "warn" if _is_deficient(record) else ""),
        number(str(record.dead_channels), "warn" if record.dead_channels else ""),
        number(f"{record.seconds:.3f}"),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _gap(gap: float | None) -> str:
    return MISSING if gap is None else in_percent(gap)


def _is_deficient(record: LayerRecord) -> bool:
    return record.rank < record.shape[1]


def _badness(record: LayerRecord) -> float:
    error = record.relative_error
    return math.inf if math.isnan(error) else error


def _words(status: str) -> str:
    return status.replace("_", " ")


def _json(records: Sequence[LayerRecord]) -> str:
    """Records as JSON without ``<``, which HTML would read as a tag; NaN becomes null."""
    rows = [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.to_dict().items()
        }
        for record in records
    ]
    text = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    return f"[{text}]".replace("<", r"\u003c")


def write_report(path: Path, page: str) -> None:
    """Write a page completely or not at all."""
    atomic_write(path, page.encode(errors="replace"))  # half a surrogate pair in a name
