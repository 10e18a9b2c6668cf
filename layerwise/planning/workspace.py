"""Memory of a solver besides the problem that it solves."""

from dataclasses import dataclass

from layerwise.solvers.least_squares import CACHED_ROWS, LeastSquares, cg_row_bytes


@dataclass(frozen=True)
class Peak:
    """Arrays that a solver holds at one point of its work, besides the problem.

    Parameters
    ----------
    matrices
        Arrays of the size of the matrix, with 8 bytes per entry.
    grams
        Arrays of the size of the gram, with 8 bytes per entry.
    rows
        Arrays of length `in` for every row of a chunk, with 8 bytes per entry.
    systems
        Arrays of the size of the gram for every row, as far as the budget allows.
    """

    matrices: float = 0.0
    grams: float = 0.0
    rows: float = 0.0
    systems: float = 0.0


@dataclass(frozen=True)
class Workspace:
    """Memory that a solver needs for one matrix: the largest of its peaks.

    Parameters
    ----------
    peaks
        Peaks of the solver, and of posing and grading the problem.
    budget
        Bytes for the rows of a chunk.
    """

    peaks: tuple[Peak, ...]
    budget: int = LeastSquares.memory_budget

    def bytes(self, rows: int, width: int, *, accelerator: bool = False) -> int:
        """Bytes for a matrix (rows, width)."""
        most = rows if accelerator else CACHED_ROWS

        def size(peak: Peak) -> float:
            chunk = min(rows, most, self.budget // cg_row_bytes(width, 4))
            arrays = peak.matrices * rows + peak.rows * chunk + peak.grams * width
            systems = 8.0 * peak.systems * rows * width**2
            return 8.0 * arrays * width + min(systems, self.budget)

        return int(max(map(size, self.peaks), default=0.0))
