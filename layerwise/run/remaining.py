"""Expected time to the end of a run, from the layers that are done."""

import re
import time
from collections.abc import Callable, Mapping

RESTORED = 0.05  # of its own seconds: a layer that comes faster was solved before
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a block or an expert, in a name


class Remaining:
    """Seconds that the layers of a run will still take.

    Layers of equal work whose names differ only in numbers are of one kind, such as the
    ``q_proj`` of all blocks, and take their mean time so far. A kind that has not come yet
    takes its work at the rate of those that have. The time of a layer is the time since the
    layer before it, passes through the model included.

    Parameters
    ----------
    work
        Expected work of every layer by name, in any unit.
    now
        Clock in seconds.
    """

    def __init__(
        self, work: Mapping[str, float], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._left = {name: (NUMBER.sub("*", name), size) for name, size in work.items()}
        self._seen: dict[tuple[str, float], tuple[int, float]] = {}  # count, seconds
        self._now, self._last = now, now()

    def after(self, name: str, solved_in: float = 0.0) -> float | None:
        """Expected seconds after a layer; None if nothing is known, or nothing is left.

        Parameters
        ----------
        name
            The layer that is done.
        solved_in
            Seconds that its solver took, now or before an interruption.
        """
        now = self._now()
        seconds, self._last = now - self._last, now
        if (kind := self._left.pop(name, None)) is None:
            return None
        if self._seen or seconds >= RESTORED * solved_in:
            count, known = self._seen.get(kind, (0, 0.0))
            self._seen[kind] = count + 1, known + seconds
        if not self._left or not self._seen:
            return None
        done = sum(kind[1] * count for kind, (count, _) in self._seen.items())
        rate = sum(known for _, known in self._seen.values()) / done
        means = {kind: known / count for kind, (count, known) in self._seen.items()}
        return sum(means.get(kind, rate * kind[1]) for kind in self._left.values())
