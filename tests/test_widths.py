"""How many channels stay at every site: rules counted by hand, and sensitivities."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from layerwise.adapters import Channels, get_adapter, get_coupling
from layerwise.errors import UsageError
from layerwise.run.channels.findings import Finding
from layerwise.run.channels.sites import Site
from layerwise.run.channels.structure import Structure
from layerwise.run.channels.widths import (
    _optimal,
    check_reachable,
    choose_widths,
    default_rule,
    is_forced,
    rule_of,
)


def site(block: int, name: str, units: int, cost: int, heads: int = 1) -> Site:
    """A site of a LLaMA with units of a given cost."""
    coupling = get_coupling(get_adapter("llama"), name)
    balance = torch.arange(units) // (units // heads) if heads > 1 else None
    channels = Channels(name, units, torch.arange(units), balance, {}, cost)
    return Site(f"model.layers.{block}", coupling, channels)


def structure(**options: Any) -> Structure:
    return Structure(**{"kind": "heads", "sparsity": 0.25, "multiple": 1, **options})


def finding(
    errors: list[float], gain: float = 1.0, probed: int = 1, scores: Any = None
) -> Finding:
    if scores is None:
        scores = torch.zeros(len(errors) - 1)
    found = torch.tensor(errors, dtype=torch.float64)
    return Finding(torch.as_tensor(scores), found, gain, probed)


MLPS = [site(0, "mlp", 40, 10), site(1, "mlp", 40, 10)]
MIXED = [
    site(0, "heads", 4, 100),
    site(0, "mlp", 40, 10),
    site(1, "heads", 4, 100),
    site(1, "mlp", 40, 10),
]


def test_uniform_removes_the_fraction_of_all_from_what_can_leave() -> None:
    """A quarter of 1600 is 400; 20 units of 10 from each of two sites of 400."""
    keep, allocation = choose_widths(structure(), "fasp", MLPS, 1600, {})
    assert keep == {"model.layers.0.mlp": 20, "model.layers.1.mlp": 20}
    assert allocation is None


@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_a_survey_cannot_change_a_width_that_is_forced(
    sparsity: float, multiple: int
) -> None:
    """Equal sites of one kind, in the stock format: as for any increasing curve."""
    asked = structure(sparsity=sparsity, multiple=multiple)
    assert is_forced(asked, MLPS)
    keep, allocation = choose_widths(asked, "columns", MLPS, 1600, {})
    assert allocation is None
    found = {s.name: finding([float(n) ** 1.5 for n in range(41)]) for s in MLPS}
    optimal = _optimal(asked, MLPS, 1600, found)
    assert keep == {name: 40 - count for name, count in optimal.removed.items()}


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ({"format": "native"}, MLPS),
        ({"format": "padded"}, MLPS),
        ({}, MIXED),
        ({}, [site(0, "mlp", 40, 10), site(1, "mlp", 20, 10)]),
        ({}, [site(0, "mlp", 40, 10), site(1, "mlp", 40, 20)]),
        ({}, [replace(one, allowed=frozenset({10, 20})) for one in MLPS]),
    ],
)
def test_other_widths_are_not_forced(options: dict[str, Any], sites: list[Site]) -> None:
    assert not is_forced(structure(**options), sites)


def test_widths_are_multiples_and_the_budget_is_still_met() -> None:
    keep, _ = choose_widths(structure(multiple=8), "fasp", MLPS, 1600, {})
    assert set(keep.values()) == {16}


def test_a_place_narrower_than_the_unit_is_free() -> None:
    keep, _ = choose_widths(structure(multiple=64), "fasp", MLPS, 1600, {})
    assert set(keep.values()) == {20}


def test_channels_fill_what_whole_heads_leave() -> None:
    """30 % of 1600 + 1600: one head of four (1.2) each, then 38 units of the 80."""
    keep, _ = choose_widths(structure(sparsity=0.3), "flap", MIXED, 1600, {})
    assert keep["model.layers.0.heads"] == keep["model.layers.1.heads"] == 3
    removed = 2 * (40 - keep["model.layers.0.mlp"]) * 10 + 2 * 100
    assert 480 <= removed < 480 + 20


def test_heads_keep_equally_many_values() -> None:
    """Eight values of each of two heads: a quarter is removed, in pairs."""
    places = [site(0, "values", 16, 5, heads=2)]
    keep, _ = choose_widths(structure(), "fasp", places, 80, {})
    assert keep == {"model.layers.0.values": 6}


def test_optimal_follows_errors_times_sensitivities() -> None:
    """Equal curves: everything is removed where an error costs the least loss."""
    curve = [float(k) for k in range(41)]
    findings = {
        "model.layers.0.mlp": finding(curve, gain=5.0, probed=10),
        "model.layers.1.mlp": finding(curve, gain=0.5, probed=10),
    }
    asked = structure(format="native")
    keep, allocation = choose_widths(asked, "columns", MLPS, 1600, findings)
    assert keep == {"model.layers.0.mlp": 39, "model.layers.1.mlp": 1}
    assert allocation is not None
    assert allocation.error == pytest.approx(0.05 * 39 + 0.5)
    tied, _ = choose_widths(structure(), "columns", MLPS, 1600, findings)
    assert set(tied.values()) == {20}


def test_a_loss_that_falls_is_luck() -> None:
    curve = [float(k) for k in range(41)]
    findings = {
        "model.layers.0.mlp": finding(curve, gain=-1.0),
        "model.layers.1.mlp": finding(curve, gain=2.0),
    }
    asked = structure(format="native")
    _, allocation = choose_widths(asked, "columns", MLPS, 1600, findings)
    assert allocation is not None
    assert allocation.error == pytest.approx(2e-3 * 39 + 2.0)
    free = {name: replace(found, gain=0.0) for name, found in findings.items()}
    keep, _ = choose_widths(asked, "columns", MLPS, 1600, free)
    assert sum(keep.values()) == 40


def test_an_error_of_zero_is_no_division() -> None:
    findings = {
        "model.layers.0.mlp": finding([0.0] * 41),
        "model.layers.1.mlp": finding([float(k) for k in range(41)]),
    }
    asked = structure(format="native")
    keep, _ = choose_widths(asked, "columns", MLPS, 1600, findings)
    assert keep["model.layers.0.mlp"] == 1


def test_al_am_ranks_the_mean_of_the_columns_of_a_unit() -> None:
    """Two heads of two columns: one high and one low column are no better than two mean."""
    coupling = get_coupling(get_adapter("llama"), "heads")
    groups = torch.tensor([0, 1, 0, 1])
    channels = Channels("heads", 2, groups, None, {}, 10)
    places = [Site("model.layers.0", coupling, channels), site(0, "mlp", 4, 10)]
    findings = {
        "model.layers.0.heads": finding([0.0] * 3, scores=[9.0, 5.0, 0.0, 5.0]),
        "model.layers.0.mlp": finding([0.0] * 5, scores=[1.0, 2.0, 3.0, 4.0]),
    }
    asked = structure(format="native", allocation="al-am", sparsity=0.5)
    keep, _ = choose_widths(asked, "flap", places, 60, findings)
    assert keep == {"model.layers.0.heads": 1, "model.layers.0.mlp": 2}


def test_manual_heads_are_those_that_are_named() -> None:
    asked = structure(allocation="ul-mm:4", sparsity=0.5)
    keep, _ = choose_widths(asked, "flap", MIXED, 1600, {})
    assert keep["model.layers.0.heads"] == keep["model.layers.1.heads"] == 2
    assert keep["model.layers.0.mlp"] == 20


@pytest.mark.parametrize(
    ("method", "format", "rule"),
    [
        ("columns", "stock", "optimal"),
        ("columns", "native", "optimal"),
        ("fasp", "native", "uniform"),
        ("flap", "stock", "uniform"),
        ("flap", "native", "al-am"),
        ("flap", "padded", "al-am"),
        ("wanda", "stock", "uniform"),
    ],
)
def test_rule_of_a_method(method: str, format: Any, rule: str) -> None:
    asked = structure(format=format)
    assert default_rule(asked, method) == rule
    assert rule_of(asked, method) == (rule, None)


@pytest.mark.parametrize("rule", ["al-am", "al-mm", "al-mm:3"])
def test_stock_blocks_are_alike(rule: str) -> None:
    with pytest.raises(UsageError, match="native or padded"):
        rule_of(structure(allocation=rule), "flap")
    assert rule_of(structure(allocation=rule, format="native"), "flap")[0] in rule


@pytest.mark.parametrize("rule", ["", "best", "uniform:2", "ul-mm:", "ul-mm:x", "ul-mm:-1"])
def test_unknown_rules_are_refused(rule: str) -> None:
    asked = structure(allocation=rule or "none")
    with pytest.raises(UsageError, match="allocation is one of"):
        rule_of(asked, "flap")


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match=r"less than 0\.5"):
        check_reachable(structure(sparsity=0.6), MLPS, 1600)
    with pytest.raises(UsageError, match="would keep no channels"):
        choose_widths(structure(sparsity=0.49, multiple=8), "fasp", MLPS, 1600, {})


EIGHT = [
    replace(site(0, "heads", 8, 50), allowed=frozenset({4, 8})),
    site(0, "mlp", 40, 10),
]


def test_uniform_takes_no_number_of_heads_that_stock_refuses() -> None:
    """40 % would keep five of eight heads; keeping four removes too much, so all stay."""
    keep, _ = choose_widths(structure(sparsity=0.4), "flap", EIGHT, 800, {})
    assert keep == {"model.layers.0.heads": 8, "model.layers.0.mlp": 8}


def test_optimal_takes_no_number_of_heads_that_stock_refuses() -> None:
    """Heads are free here, but only four of them can be removed at once."""
    findings = {
        "model.layers.0.heads": finding([0.0, *[1e-6 * k for k in range(1, 9)]]),
        "model.layers.0.mlp": finding([float(k) for k in range(41)]),
    }
    keep, _ = choose_widths(structure(sparsity=0.4), "columns", EIGHT, 800, findings)
    assert keep == {"model.layers.0.heads": 4, "model.layers.0.mlp": 28}


def test_a_manual_number_of_heads_that_stock_refuses_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"heads would keep 6, .* accepts 4, 8"):
        choose_widths(structure(allocation="ul-mm:2"), "flap", EIGHT, 800, {})
