"""The solvers, one algorithm per file.

``SOLVERS`` maps every name to a factory without arguments. To add a solver, add its file
and one line here; tests, documentation checks and the command line then include it.
"""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from layerwise.errors import UsageError
from layerwise.solver import Solver
from layerwise.solvers.admm import ADMM, ALPS
from layerwise.solvers.best import Best
from layerwise.solvers.columns import (
    ColumnPruning,
    fasp,
    flap,
    magnitude_sp,
    wanda_sp,
)
from layerwise.solvers.dsnot import DSnoT
from layerwise.solvers.fista import Fista, fista_paper
from layerwise.solvers.frank_wolfe import FrankWolfe
from layerwise.solvers.gblm import GBLM
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.magnitude import Magnitude
from layerwise.solvers.multi_weight import (
    MultiWeight,
    multi_weight_mm,
    multi_weight_ms,
    multi_weight_sm,
    multi_weight_ss,
)
from layerwise.solvers.obs import OBS
from layerwise.solvers.ria import RIA
from layerwise.solvers.sparse_swaps import SparseSwaps
from layerwise.solvers.sparsegpt import SparseGPT
from layerwise.solvers.swaps import Swaps
from layerwise.solvers.wanda import Wanda

SOLVERS: Mapping[str, Callable[[], Solver]] = MappingProxyType(
    {
        "magnitude": Magnitude,
        "wanda": Wanda,
        "ria": RIA,
        "gblm": GBLM,
        "dsnot": DSnoT,
        "frank-wolfe": FrankWolfe,
        "sparsegpt": SparseGPT,
        "multi-weight": MultiWeight,
        "multi-weight-ss": multi_weight_ss,
        "multi-weight-sm": multi_weight_sm,
        "multi-weight-ms": multi_weight_ms,
        "multi-weight-mm": multi_weight_mm,
        "fista": Fista,
        "fista-paper": fista_paper,
        "least-squares": LeastSquares,
        "admm": ADMM,
        "alps": ALPS,
        "obs": OBS,
        "swaps": Swaps,
        "sparse-swaps": SparseSwaps,
        "best": Best,
        "columns": ColumnPruning,
        "fasp": fasp,
        "flap": flap,
        "wanda-sp": wanda_sp,
        "magnitude-sp": magnitude_sp,
    }
)


def get_solver(name: str) -> Solver:
    """Solver with its defaults; the error for an unknown name suggests close names."""
    if name not in SOLVERS:
        close = difflib.get_close_matches(name, SOLVERS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        message = f"unknown method {name!r}: {hint}Known: {', '.join(SOLVERS)}"
        raise UsageError(message)
    return SOLVERS[name]()


if __name__ != "layerwise.solvers":  # a second copy of every class would follow
    _message = "import layerwise.solvers, not the folder it lies in"
    raise ImportError(_message)
