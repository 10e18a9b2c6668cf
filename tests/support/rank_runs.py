"""A process that has imported everything and forks the ranks of a run for a test.

``python -m tests.support.rank_runs`` reads one request per line, a JSON object: the `port`
of the store, and for every rank of the run its `job` and `arguments`. It answers with one
line: the exit code and the answer of every rank, and the seconds that all of them took.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from layerwise.accumulator import MomentAccumulator
from layerwise.errors import LayerwiseError
from layerwise.problem import LayerProblem
from layerwise.run.prune import prune_model
from layerwise.run.workers.ranks import Ranks, ranks_of_environment
from layerwise.solution import Solution
from layerwise.solve import solve
from tests.support.models import random_tokens, tiny_model

SEQUENCES, LENGTH = 10, 12
CRASH = 3  # exit code of a rank that fails by an error other than a LayerwiseError


class FailsOnRank:
    """Fails at a layer of the second block, on the rank that has it."""

    name = "fails-on-rank"
    fingerprint = "wanda"  # whenever it fails, its answers are the same

    def __init__(self, rank: int, after: int) -> None:
        self._rank, self._left = rank, after

    def solve(self, problem: LayerProblem) -> Solution:
        """Solve by Wanda until the count runs out."""
        if int(os.environ.get("RANK", "0")) == self._rank:
            self._left -= 1
            if self._left < 0:
                message = "out of order"
                raise RuntimeError(message)
        return solve(problem, "wanda")


class CallCounter:
    """Callback that counts its calls."""

    def __init__(self) -> None:
        self.layers, self.finished = 0, 0

    def on_start(self, n_layers: int) -> None: ...

    def on_layer(self, record: Any) -> None:
        self.layers += 1

    def on_finish(self, report: Any) -> None:
        self.finished += 1


def prune(arguments: dict[str, Any]) -> dict[str, Any]:
    """Prune a folder, or a model in memory if there is none."""
    calls = CallCounter()
    method = arguments.pop("method", "wanda+least-squares")
    if isinstance(method, dict):
        method = FailsOnRank(**method)
    source = arguments.pop("source", None) or tiny_model("llama")
    arguments = {
        "sparsity": 0.5,
        "calibration": random_tokens(SEQUENCES, LENGTH),
        "n_sequences": SEQUENCES,
        "sequence_length": LENGTH,
        **arguments,
    }
    report = prune_model(source, method, callbacks=[calls], **arguments)
    parameters = report.model.parameters()
    return {
        "layers": calls.layers,
        "finished": calls.finished,
        "masks": {name: mask.int().tolist() for name, mask in report.masks.items()},
        "weights": float(sum(p.detach().double().abs().sum() for p in parameters)),
    }


def moments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Moments of inputs that are split over the ranks, from the sums over all ranks."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    pruned = dense + 0.1 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    weights = [torch.randn(rows, 6, generator=generator) for rows in arguments["rows"]]
    found: dict[str, Any] = {}
    with ranks_of_environment() as ranks:
        accumulator = MomentAccumulator(6, weights)
        for rows in torch.split(torch.arange(40)[ranks.rank :: ranks.size], 9):
            pair = (pruned[rows],) if arguments["pair"] else ()
            accumulator.update(dense[rows], *pair)
        accumulator.add_over(ranks.all_reduce)
        for name, value in vars(accumulator.moments()).items():
            found[name] = value.tolist() if isinstance(value, torch.Tensor) else value
        for index in range(len(weights)):
            drift = accumulator.drift(index)
            found[f"drift {index}"] = None if drift is None else drift.tolist()
    return {name: value for name, value in found.items() if name[0] != "_"}


def words(arguments: dict[str, Any]) -> dict[str, Any]:
    """All collective operations, twice, because one process can make several runs."""
    found = []
    for number in range(2):
        with ranks_of_environment() as ranks:
            found.append(exchange(ranks, number))
    return {"found": found}


def exchange(ranks: Ranks, number: int) -> list[Any]:
    """Results of one rank after broadcasts and an all-reduce."""
    text = ranks.broadcast_text(
        "word", f"word {number}" if ranks.rank == 1 % ranks.size else None
    )
    total = torch.tensor([ranks.rank + 1.0], dtype=torch.float64)
    ranks.all_reduce([total])
    mask = torch.tensor([ranks.rank == 1, True])
    half = torch.tensor([ranks.rank + 0.5], dtype=torch.bfloat16)
    ranks.broadcast([mask, half], 1 % ranks.size)
    return [text, float(total), mask.tolist(), float(half)]


def stalls(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank dies silently while the other waits for it."""
    with ranks_of_environment() as ranks:
        ranks.barrier()
        if ranks.rank == arguments["dies"]:
            os._exit(CRASH)
        ranks.barrier()
    return {}


JOBS = {"prune": prune, "moments": moments, "words": words, "stalls": stalls}


def work(request: dict[str, Any], rank: int) -> tuple[int, dict[str, Any]]:
    """Exit code and answer of one rank."""
    size = len(request["ranks"])
    if size > 1 or request.get("alone"):
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(request["port"]),
        }
    own = request["ranks"][rank]
    try:
        return 0, JOBS[own["job"]](own["arguments"])
    except LayerwiseError as error:
        return error.exit_code, {"error": f"{type(error).__name__}: {error}"}
    except Exception as error:
        return CRASH, {"error": f"{type(error).__name__}: {error}"}


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """Run every rank in a child of this process."""
    start = time.monotonic()
    children = {}
    for rank in range(len(request["ranks"])):
        answer = Path(request["folder"]) / f"answer-{rank}.json"
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = CRASH
            try:
                code, found = work(request, rank)
                answer.write_text(json.dumps(found), encoding="utf-8")
            finally:
                os._exit(code)
        children[child] = answer
    codes, answers = [], []
    for child, answer in children.items():
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        text = answer.read_text(encoding="utf-8") if answer.exists() else "{}"
        answers.append(json.loads(text))
    seconds = time.monotonic() - start
    return {"codes": codes, "answers": answers, "seconds": seconds}


def warm_up() -> None:
    """Import what a run imports, before there are children."""
    import torch.distributed

    assert torch.distributed.is_available()
    prune({})


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(fork(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
