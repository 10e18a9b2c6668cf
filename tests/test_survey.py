"""The survey before a structured run: what it says, and that it leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.run.channels import removal
from layerwise.run.channels.findings import Finding
from layerwise.run.channels.survey import PROBE_SHARE
from layerwise.run.channels.survey import survey as original
from layerwise.run.data.perplexity import mean_loss
from tests.support.models import tiny_model
from tests.support.shrinking import LENGTH, inputs_of, smaller, windows
from tests.support.tolerances import SURVEY


class Found(Exception):
    """Carries the findings of a survey."""


def findings(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Sites and findings of a run that ends after its survey."""

    def spy(run: Any, method: Any, sites: Any, **kwargs: Any) -> None:
        raise Found(sites, original(run, method, sites, **kwargs))

    monkeypatch.setattr(removal, "survey", spy)
    with pytest.raises(Found) as caught:
        smaller(model, format="native", pattern="columns", **options)
    return caught.value.args


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "opt", "mamba"])
@pytest.mark.parametrize("method", ["columns", "flap"])
def test_nothing_is_left_behind(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaMA and Mamba get biases for the measurement, which must be gone after it."""
    model = tiny_model(family)
    before = state(model)
    findings(model, monkeypatch, method=method, allocation="optimal")
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_curves_and_gains_are_what_removal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a restoration both can be computed by hand."""
    model: Any = tiny_model("llama")
    sites, found = findings(model, monkeypatch, method="magnitude-sp", allocation="optimal")
    dense_loss = loss(model)
    checked = 0
    for block_name, members in sites.items():
        for site in members:
            if site.coupling.name != "mlp":
                continue
            finding: Finding = found[site.name]
            name = f"{block_name}.{site.main}"
            weight = model.get_submodule(name).weight.detach().double()
            scores = weight.abs().sum(dim=0)
            torch.testing.assert_close(finding.scores, scores)
            order, inputs = scores.argsort(), inputs_of(model, name)
            assert finding.errors is not None
            for count in (0, 1, 5, len(order) - 1):
                gone = order[:count]
                lost = (inputs[:, gone] @ weight[:, gone].T).square().sum()
                error = float(lost) / len(inputs)
                assert float(finding.errors[count]) == pytest.approx(error, rel=SURVEY)
            assert finding.probed == int(PROBE_SHARE * len(order))
            pruned = copy.deepcopy(model)
            with torch.no_grad():
                gone = order[: finding.probed]
                pruned.get_submodule(name).weight[:, gone] = 0
            assert finding.gain == pytest.approx(loss(pruned) - dense_loss, rel=SURVEY)
            checked += 1
    assert checked == model.config.num_hidden_layers


def test_a_ranking_asks_for_scores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = findings(tiny_model("llama"), monkeypatch, allocation="al-am")
    assert all(f.errors is None and f.gain == 0 for f in found.values())


def loss(model: Any) -> float:
    return mean_loss(model, windows().reshape(-1), sequence_length=LENGTH)
