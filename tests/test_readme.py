"""The documentation: its code runs, its links lead somewhere, its tables are complete."""

import dataclasses
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from layerwise import errors
from layerwise.adapters import ADAPTERS
from layerwise.cli import EXIT_INTERRUPTED, app
from layerwise.run.pipeline.removal import BlockStep, Prepared, Removal
from layerwise.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)
HISTORY = {  # says what was there once
    "CHANGELOG.md",
    "docs/adr/0014-packages-of-the-run.md",
}
UNITS = {"GiB": 1 << 30}


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [code for name, code in fences if name == language]


def table_rows(page: str) -> Iterator[list[str]]:
    """Cells of every table row of a page, without headings and rules."""
    lines = text_of(page).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        rule = line.startswith("|--") or following.startswith("|--")
        if line.startswith("|") and not rule:
            yield [cell.strip() for cell in line.strip("|").split("|")]


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


def test_there_is_code_to_run() -> None:
    assert {"README.md", "docs/problem.md", "docs/adding-a-solver.md"} <= set(WITH_CODE)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_fences_are_closed_and_have_a_known_language(page: str) -> None:
    fences = re.findall(r"^```(.*)$", text_of(page), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", "sh", "yaml", "text"}
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
            assert heading in slugs, target


def mentioned(page: str) -> set[str]:
    """Dotted names of the package on a page, also those that it imports one by one."""
    names = set(re.findall(r"(?<![\w./])layerwise(?:\.[A-Za-z_]\w*)+", text_of(page)))
    imports = r"from (layerwise[.\w]*) import (\([^)]*\)|[^\n`]*)"
    for module, imported in re.findall(imports, text_of(page)):
        for part in imported.strip("()").split(","):
            if part.strip():
                names.add(f"{module}.{part.split()[0]}")
    return names


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module has."""
    module, _, rest = name.partition(".")
    found: Any = importlib.import_module(module)
    for part in filter(None, rest.split(".")):
        module = f"{module}.{part}"
        try:  # first, for a function may hide a module of its name
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
    return True


WITH_NAMES = [page for page in PAGES if page not in HISTORY and mentioned(page)]


@pytest.mark.parametrize("page", WITH_NAMES)
def test_names_of_the_package_exist(page: str) -> None:
    assert [name for name in sorted(mentioned(page)) if not exists(name)] == []


def test_names_are_found() -> None:
    assert "layerwise.demo.model_path" in mentioned("README.md")
    assert exists("layerwise.solvers.fista.Fista.solve")
    assert not exists("layerwise.solvers.fista.fist")
    assert not exists("layerwise.solver.fista")


@pytest.mark.parametrize("page", sorted({*PAGES} - HISTORY))
def test_files_of_the_package_exist(page: str) -> None:
    """Python files, and folders that are written with a slash at the end."""
    folder = r"(?<![\w/])(?:layerwise|solvers|adapters|tests)(?:/[\w*-]+)*"
    for path in re.findall(rf"{folder}(?:\.py\b|/(?![\w*]))", text_of(page)):
        assert any(ROOT.glob(path)), path


def test_readme_lists_every_solver_and_model() -> None:
    first = [row[0] for row in table_rows("README.md")]
    named = [re.sub(r"\[?`([^`]*)`.*", r"\1", cell) for cell in first]
    assert named == [*SOLVERS, *ADAPTERS]


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_solver_tables_are_complete(page: str) -> None:
    cells = " ".join(row[0] for row in table_rows(page))
    assert [name for name in SOLVERS if f"`{name}`" not in cells] == []


def page_of(solver: str) -> str:
    """Page of a solver; presets of one class share the page of the class."""
    page = f"docs/solvers/{solver}.md"
    if page in PAGES or "-" not in solver:
        return page
    return page_of(solver.rpartition("-")[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_option_is_documented_with_its_default(solver: str) -> None:
    options = {
        field.name: getattr(SOLVERS[solver](), field.name)
        for field in dataclasses.fields(SOLVERS[solver]())  # type: ignore[arg-type]
        if field.name != "name"
    }
    lines = text_of(page_of(solver)).splitlines()
    heading = next((line for line in lines if line.startswith("| option")), "")
    columns = [cell.strip(" `") for cell in heading.strip("|").split("|")]
    column = columns.index(solver) if solver in columns else 1
    shown = {row[0].strip("`"): row[column] for row in table_rows(page_of(solver))}
    assert set(shown) == set(options)
    for name, value in options.items():
        if value is not None:  # None: chosen by the pattern, in words
            assert _parsed(shown[name]) == value, name


def _parsed(cell: str) -> Any:
    cell = cell.strip("`")
    number, _, unit = cell.partition(" ")
    if unit:
        return float(number) * UNITS[unit]
    if cell in ("true", "false"):
        return cell == "true"
    try:
        return float(cell)
    except ValueError:
        return cell


def test_command_line_page_names_every_command_and_flag() -> None:
    page, command = text_of("docs/command-line.md"), get_command(app)
    commands: dict[str, Any] = vars(command)["commands"]
    assert commands
    documented = set(re.findall(r"--[a-z][a-z-]*", page))
    known = {"--version", "--debug", "--help", "--nproc-per-node"}  # the last is torchrun's
    for name, entry in commands.items():
        assert f"`layerwise {name}" in page
        flags = {option for p in entry.params for option in [*p.opts, *p.secondary_opts]}
        flags = {flag for flag in flags if flag.startswith("--")}
        known |= flags
        assert flags <= documented | {"--help"}, name
    assert documented <= known


def test_exit_codes_are_those_of_the_exceptions() -> None:
    rows = [row for row in table_rows("docs/command-line.md") if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == sorted({int(row[0]) for row in rows})
    assert int(rows[-1][0]) == EXIT_INTERRUPTED
    for code, _, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert getattr(errors, name).exit_code == int(code), name


def test_the_page_on_removals_names_the_whole_protocol() -> None:
    named = set(re.findall(r"`(\w+)`", text_of("docs/adding-a-removal.md")))
    for protocol in (Removal, Prepared, BlockStep):
        assert {name for name in vars(protocol) if not name.startswith("_")} <= named


def test_every_adr_is_numbered_and_has_its_sections() -> None:
    records = [page for page in PAGES if page.startswith("docs/adr/")]
    assert records
    for number, page in enumerate(records, start=1):
        assert Path(page).name.startswith(f"{number:04d}-")
        titles = re.findall(r"^## (.*)$", text_of(page), re.MULTILINE)
        assert titles == ["Context", "Options", "Decision", "Price"]
        assert text_of(page).startswith(f"# {number:04d}. ")
