"""Three tiny trained language models, and their training text.

The models let every command and every test run in seconds without a download. Each is
a folder in the format of ``transformers``, and they share one tokenizer. Their language
is Python: the text is the source code of the standard library, which is always available.
The modules are listed one by one, so that the held-out text is the same everywhere and no
model was trained on it. Only the version of Python matters (the models learned 3.11).
"""

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from layerwise.errors import DataError, UsageError

__all__ = [
    "CALIBRATION",
    "EVALUATION",
    "MODELS",
    "calibration_text",
    "evaluation_text",
    "model_path",
]

MODELS: Final = ("opt", "llama", "mamba")

CALIBRATION: Final[tuple[str, ...]] = tuple(
    """
    _collections_abc.py argparse.py ast.py base64.py bdb.py calendar.py codecs.py
    collections/__init__.py concurrent/futures/_base.py
    concurrent/futures/process.py contextlib.py copy.py csv.py dataclasses.py
    difflib.py doctest.py email/feedparser.py email/message.py email/utils.py
    enum.py functools.py gettext.py gzip.py hashlib.py heapq.py html/parser.py
    http/client.py http/cookiejar.py inspect.py ipaddress.py json/decoder.py
    json/encoder.py logging/__init__.py logging/handlers.py mimetypes.py
    multiprocessing/managers.py multiprocessing/pool.py numbers.py operator.py
    optparse.py os.py pickle.py pkgutil.py posixpath.py pprint.py random.py
    re/_parser.py selectors.py shelve.py shlex.py socket.py socketserver.py ssl.py
    statistics.py subprocess.py tarfile.py threading.py tokenize.py trace.py
    traceback.py types.py typing.py unittest/case.py unittest/loader.py
    urllib/parse.py urllib/request.py warnings.py weakref.py
    xml/etree/ElementTree.py
    """.split()
)
"""Modules for training and calibration, relative to the standard library."""

EVALUATION: Final[tuple[str, ...]] = (
    "configparser.py",
    "fractions.py",
    "http/server.py",
    "queue.py",
    "shutil.py",
    "tempfile.py",
    "textwrap.py",
    "tomllib/_parser.py",
    "zoneinfo/_zoneinfo.py",
)
"""Modules held out for evaluation; no model was trained on them."""


def model_path(name: str) -> Path:
    """Folder of the packaged model `name`, one of `MODELS`."""
    if name not in MODELS:
        message = f"no demo model is called {name!r}; choose from {', '.join(MODELS)}"
        raise UsageError(message)
    return Path(__file__).parent / name


def calibration_text() -> str:
    """Source code that the models were trained on, about 3 MB."""
    return "\n".join(_sources(CALIBRATION))


def evaluation_text() -> str:
    """Source code that no model was trained on, about 0.3 MB."""
    return "\n".join(_sources(EVALUATION))


def _sources(modules: Iterable[str]) -> list[str]:
    """Read `modules`; a missing module is an error, because it would change the text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for module in modules:
        try:
            texts.append((library / module).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            message = (
                f"the demo text needs the source of the standard library, but "
                f"{library / module} cannot be read ({type(error).__name__}); "
                "use a complete Python installation"
            )
            raise DataError(message) from error
    return texts
