"""Building blocks of a report: the empty page with its styles, numbers, tables.

Every function escapes its text arguments, unless its docstring says that they are HTML.
"""

import math
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2128; --soft: #57606a;
  --line: #d8dee4; --tint: #f3f5f7; --best: #d3f0db; --warn: #ffe8bd; --link: #0a5bb5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --text: #e4e8ec; --soft: #9aa5b1; --line: #363d46;
    --tint: #20252b; --best: #1b4a2d; --warn: #553c0c; --link: #7ab7ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1, h2, h3, p, dd { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .875em; }
pre { margin: 0; padding: .75rem 1rem; line-height: 1.45; }
.soft { color: var(--soft); }
.scroll { overflow: auto; max-height: 85vh; margin: .75rem 0; width: fit-content;
  max-width: 100%; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; }
th, td { padding: .3rem .65rem; text-align: left; vertical-align: baseline;
  font-weight: 400; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
tbody th[scope=row] { position: sticky; left: 0; background: var(--page); }
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--tint); font-weight: 600;
  line-height: 1.25; vertical-align: bottom; }
thead th:first-child { left: 0; z-index: 2; }
th[scope=rowgroup] { padding-top: .9rem; font-weight: 600; }
.number, .figure { font-variant-numeric: tabular-nums; }
.number { text-align: right; }
.best { background: var(--best); font-weight: 700; }
.warn { background: var(--warn); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .35rem 1rem;
  margin: .5rem 0; }
dt { color: var(--soft); }
dd { margin: 0; }
summary { cursor: pointer; }
details ul { margin: .25rem 0; padding-left: 1.25rem; }
.plots, .beside { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.plot { margin: .5rem 0; padding: .75rem; max-width: 47.5rem; background: #fff;
  color: #1c2128; border: 1px solid var(--line); border-radius: .5rem; }
.plot > svg { display: block; width: 100%; height: auto; }
.plot text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif
  !important; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none;
  margin: .5rem 0 0; padding: 0; font-size: .875rem; line-height: 1.3; }
.legend li { display: flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
.swatch { flex: none; width: 2.2rem; height: 1rem; }
figcaption { margin-top: .5rem; font-size: .8125rem; line-height: 1.4; color: #57606a;
  overflow-wrap: anywhere; }
@media (min-width: 48rem) { th wbr { display: none; } }
@media (max-width: 48rem) { .name { min-width: 8.25rem; }
  tbody th[scope=row] { border-right: 1px solid var(--line); } }
@media (max-width: 30rem) { main { padding: 1rem .75rem 2rem; }
  table { font-size: .8125rem; } th, td { padding: .3rem .35rem; } }
@media print { .scroll { max-height: none; overflow: visible; } }
"""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
MISSING = "\N{EN DASH}"


def page(title: str, body: str) -> str:
    """Complete page around `body`, which is HTML; the page may load no other resource."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def decimal(value: float, places: int) -> str:
    """Value with fixed decimals, or in scientific notation if it is tiny or huge."""
    if not math.isfinite(value):
        return str(value)
    if value and not 0.5 * 10.0**-places <= abs(value) < 1e7:
        return f"{value:.1e}"
    return f"{value:,.{places}f}"


def breakable(text: str) -> str:
    """Text that may wrap after the dots, pluses and slashes of a name."""
    text = escape(text)
    for separator in "./+":
        text = text.replace(separator, f"{separator}<wbr>")
    return text


def number(text: str, style: str = "") -> str:
    """Right-aligned cell of a table."""
    return f'<td class="{f"number {style}".strip()}">{escape(text)}</td>'


def table(columns: Sequence[str], numeric: Sequence[bool], bodies: str) -> str:
    """Table with a header; `bodies` are HTML."""
    head = "".join(
        f'<th scope="col"{" class=number" * right}>{escape(column)}</th>'
        for column, right in zip(columns, numeric, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead>\n{bodies}</table>"


def scrollable(label: str, content: str) -> str:
    """Box for wide `content`, which is HTML; the keyboard can scroll it too."""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f"{content}</div>"
    )


def foldable(summary: str, names: Sequence[str]) -> str:
    """Line that expands to a list of names."""
    items = "".join(f"<li><code>{breakable(name)}</code></li>" for name in names)
    return f"<details><summary>{escape(summary)}</summary><ul>{items}</ul></details>"
