"""One thread, deterministic kernels, and the profiles of the property tests."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite("tests.support.contract")  # before its first import

# Ray reads its token once in a process, and would write one into the home.
os.environ["RAY_AUTH_TOKEN"] = "0123456789abcdef" * 4

# The same examples on every machine; the nightly profile looks for new ones.
hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=20, derandomize=True, database=None
)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="PyTorch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Deterministic kernels, and NaN in memory that nobody wrote; CPU only."""
    on_cpu = request.node.get_closest_marker("gpu") is None
    torch.use_deterministic_algorithms(on_cpu)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
