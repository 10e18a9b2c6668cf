"""The distribution: what is in the wheel, and that it works away from the checkout.

The tests marked ``package`` build sdist and wheel and are run by ``make package``; the
others read the checkout only.
"""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import layerwise
from layerwise.demo import MODELS

ROOT = Path(__file__).parents[1]
FOLDERS = {"layerwise": "layerwise", "layerwise/solvers": "solvers"} | {
    "layerwise/adapters": "adapters"
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

IMPORT_EVERYTHING = """
import sys
from pathlib import Path

import layerwise, layerwise.adapters, layerwise.demo, layerwise.run, layerwise.solvers
from layerwise.cli import run

installed = Path({installed!r})
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "layerwise":
        assert Path(module.__file__).is_relative_to(installed), (name, module.__file__)
for name in layerwise.solvers.SOLVERS:
    assert layerwise.solvers.get_solver(name).name == name
for model_type in layerwise.adapters.ADAPTERS:
    assert layerwise.adapters.get_adapter(model_type).stages
for name in layerwise.demo.MODELS:
    assert (layerwise.demo.model_path(name) / "model.safetensors").is_file(), name
assert layerwise.prune_model.__module__ == "layerwise.run.prune"
assert run(["--version"]) == 0
"""


@dataclass(frozen=True)
class Distribution:
    """Both archives, and a folder into which the wheel alone is installed."""

    sdist: Path
    wheel: Path
    installed: Path

    def files(self) -> dict[str, zipfile.ZipInfo]:
        with zipfile.ZipFile(self.wheel) as archive:
            return {info.filename: info for info in archive.infolist()}


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Build the sdist, the wheel from the sdist, and install it into an empty folder."""
    folder = tmp_path_factory.mktemp("distribution")
    _run("build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    installed = folder / "installed"
    _run(
        *("pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--no-index", "--target", str(installed), str(wheel)),
        cwd=folder,
    )
    return Distribution(sdist, wheel, installed)


def _run(module: str, *arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.package
@pytest.mark.slow
def test_the_wheel_holds_every_module_of_the_checkout(distribution: Distribution) -> None:
    sources = {
        f"{name}/{path.relative_to(ROOT / folder).as_posix()}"
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "layerwise" / "solvers")
        and not path.is_relative_to(ROOT / "layerwise" / "adapters")
    }
    assert "layerwise/solvers/fista.py" in sources
    assert "layerwise/run/prune.py" in sources
    packed = {name for name in distribution.files() if name.endswith(".py")}
    assert packed == sources


@pytest.mark.package
@pytest.mark.slow
def test_the_wheel_holds_types_models_and_licence(distribution: Distribution) -> None:
    files = set(distribution.files())
    assert "layerwise/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    for model in MODELS:
        folder = ROOT / "layerwise" / "demo" / model
        present = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= present
        assert {f"layerwise/demo/{model}/{name}" for name in present} <= files


@pytest.mark.package
@pytest.mark.slow
def test_one_import_name_real_folders_and_no_links(distribution: Distribution) -> None:
    files = distribution.files()
    tops = {name.split("/")[0] for name in files}
    (metadata,) = tops - {"layerwise"}
    assert metadata.endswith(".dist-info")
    links = [name for name, info in files.items() if (info.external_attr >> 28) == 0xA]
    assert links == []
    with tarfile.open(distribution.sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    names = {member.name.partition("/")[2] for member in members}
    assert {"solvers/fista.py", "adapters/llama.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("layerwise/solvers")]


@pytest.mark.package
@pytest.mark.slow
@pytest.mark.parametrize("folder", ["solvers", "adapters"])
def test_the_installed_folders_have_no_second_name(
    distribution: Distribution, tmp_path: Path, folder: str
) -> None:
    installed = str(distribution.installed)
    absent = f"import importlib.util as u; assert u.find_spec({folder!r}) is None"
    assert _python(absent, [installed], tmp_path) == ""
    inside = [str(distribution.installed / "layerwise"), installed]
    assert _python(f"import {folder}", inside, tmp_path) == (
        f"ImportError: import layerwise.{folder}, not the folder it lies in"
    )


def _python(program: str, paths: list[str], cwd: Path) -> str:
    """Last line of the errors of a program that sees these folders first."""
    # -P: the folder where it runs is none of them
    start = f"import sys; sys.path[:0] = {paths!r}\n"
    command = [sys.executable, "-P", "-c", start + program]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return (done.stderr.splitlines() or [""])[-1]


@pytest.mark.package
@pytest.mark.slow
def test_the_installed_wheel_imports_outside_the_checkout(
    distribution: Distribution, tmp_path: Path
) -> None:
    program = IMPORT_EVERYTHING.format(installed=str(distribution.installed))
    assert _python(program, [str(distribution.installed)], tmp_path) == ""


def test_one_version() -> None:
    assert PROJECT["project"]["version"] == layerwise.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{layerwise.__version__}]" in changelog


def test_every_package_is_declared() -> None:
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {
        ".".join((*name.split("/"), *path.parent.relative_to(ROOT / folder).parts))
        for name, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert declared == found


def test_constraints_pin_what_the_makefile_and_the_project_name() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    installed = {_canonical(name): value for name, value in pins.items()}
    assert f"torch=={installed['torch']}\n" in (ROOT / "Makefile").read_text()
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["report"], *extras["dev"]]:
        name = _canonical(re.split(r"[\[<>=]", requirement)[0])
        assert name in installed or name in ("layerwise", "setuptools"), requirement


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
