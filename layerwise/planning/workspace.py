"""What a solver keeps in memory beside the problem that it solves."""

from dataclasses import dataclass

from layerwise.solvers.least_squares import CACHED_ROWS, LeastSquares, cg_row_bytes


@dataclass(frozen=True)
class Peak:
    """Arrays that a solver holds at one point of its work, beside the problem.

    Parameters
    ----------
    matrices
        Of the size of the matrix, in units of 8 bytes an entry.
    grams
        Of the size of the gram, likewise.
    rows
        Of the width, for every row that is worked on together, likewise.
    """

    matrices: float = 0.0
    grams: float = 0.0
    rows: float = 0.0


@dataclass(frozen=True)
class Workspace:
    """What a solver needs for one matrix: the largest of its peaks.

    Parameters
    ----------
    peaks
        Of the solver, and of posing and grading the problem.
    budget
        Bytes for rows that are worked on together.
    """

    peaks: tuple[Peak, ...]
    budget: int = LeastSquares.memory_budget

    def bytes(self, rows: int, width: int, *, accelerator: bool = False) -> int:
        """Bytes for a matrix (rows, width)."""
        most = rows if accelerator else CACHED_ROWS

        def size(peak: Peak) -> float:
            chunk = min(rows, most, self.budget // cg_row_bytes(width, 4))
            arrays = peak.matrices * rows + peak.rows * chunk + peak.grams * width
            return 8.0 * arrays * width

        return int(max(map(size, self.peaks), default=0.0))
