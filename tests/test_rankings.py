"""Rules of the papers, against counts worked out by hand."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch

from layerwise.errors import UsageError
from layerwise.run.channels.rankings import (
    Units,
    al_am,
    al_mm,
    fasp,
    raised_fraction,
    ul_mm,
    uniform,
)

HIDDEN, INNER, HEAD = 4096, 11008, 128  # LLaMA-7B
HEAD_COST, NEURON_COST = 4 * HEAD * HIDDEN, 3 * HIDDEN


def neurons(layer: int, scores: Sequence[float], cost: float = 1.0) -> Units:
    return Units(f"{layer}.mlp", str(layer), "mlp", torch.tensor(scores), cost)


def heads(layer: int, scores: Sequence[Sequence[float]], cost: float = 2.0) -> Units:
    return Units(f"{layer}.heads", str(layer), "heads", torch.tensor(scores), cost)


def random_model(
    layers: int = 3, n_heads: int = 8, inner: int = 60, seed: int = 0
) -> list[Units]:
    """Heads of four channels that cost 20 neurons each."""
    generator = torch.Generator().manual_seed(seed)
    units = []
    for layer in range(layers):
        head_scores = torch.rand(n_heads, 4, generator=generator).exp()
        scores = 100 * torch.rand(inner, generator=generator).square()
        units.append(Units(f"{layer}.heads", str(layer), "heads", head_scores, 20.0))
        units.append(Units(f"{layer}.mlp", str(layer), "mlp", scores, 1.0))
    return units


def cost_of(units: Sequence[Units], removed: dict[str, int]) -> float:
    return sum(removed[u.name] * u.cost for u in units)


# --- uniform, FASP --------------------------------------------------------------------


def test_uniform_takes_the_exact_floor() -> None:
    units = [neurons(0, [1.0] * 100), neurons(1, [1.0] * 10), heads(1, [[1.0]] * 3)]
    assert uniform(units, 0.29) == {"0.mlp": 29, "1.mlp": 2, "1.heads": 0}
    assert uniform(units, 0.999) == {"0.mlp": 99, "1.mlp": 9, "1.heads": 2}
    assert uniform(units, 0) == {"0.mlp": 0, "1.mlp": 0, "1.heads": 0}


def test_one_unit_stays() -> None:
    assert uniform([neurons(0, [1.0])], 0.5) == {"0.mlp": 0}


@pytest.mark.parametrize(("asked", "raised"), [(0.1, 12), (0.2, 24), (0.3, 36)])
def test_fasp_on_opt(asked: float, raised: int) -> None:
    """q and k hold 2 h^2 of the 12 h^2 parameters of a block."""
    h = 100
    values = Units("v", "0", "values", torch.ones(h), 2.0 * h)
    mlp = Units("m", "0", "mlp", torch.ones(4 * h), 2.0 * h)
    assert raised_fraction([values, mlp], asked, 12.0 * h * h) == Fraction(raised, 100)
    assert fasp([values, mlp], asked, 12.0 * h * h) == {"v": raised, "m": 4 * raised}


def test_fasp_cannot_remove_what_is_never_pruned() -> None:
    with pytest.raises(UsageError, match=r"ask for less than 0\.8333"):
        fasp([neurons(0, [1.0] * 10)], 0.9, 12.0)


# --- FLAP: manual modules --------------------------------------------------------------


def test_ul_mm_on_llama_7b() -> None:
    """The formula of the published code: 64 heads of 32 layers, 20 %."""
    units = []
    for layer in range(32):
        head_scores = torch.ones(HIDDEN // HEAD, HEAD)
        units.append(Units(f"{layer}.h", str(layer), "heads", head_scores, HEAD_COST))
        units.append(Units(f"{layer}.m", str(layer), "mlp", torch.ones(INNER), NEURON_COST))
    whole = 3 * HIDDEN * INNER + 4 * HIDDEN**2
    left = 0.2 * whole - 4 * HIDDEN * HEAD * 2
    expected = {"h": 2, "m": math.floor(left / (3 * HIDDEN))}
    found = ul_mm(units, 0.2, {"heads": 64})
    assert {tuple(name.split(".")): n for name, n in found.items()} == {
        (str(layer), kind): n for layer in range(32) for kind, n in expected.items()
    }


def test_al_mm_ranks_within_a_kind() -> None:
    """Heads: z means of layer 0 are -1, 1 and of layer 1 the same; ties go in order."""
    units = [
        heads(0, [[1.0, 1.0], [3.0, 3.0]]),
        neurons(0, [0.0, 10.0, 20.0, 30.0]),
        heads(1, [[5.0, 5.0], [1.0, 1.0]]),
        neurons(1, [5.0, 6.0, 7.0, 100.0]),
    ]
    # total 16, half is 8; one head costs 2, so six neurons go: three of each layer
    assert al_mm(units, 0.5, {"heads": 1}) == {
        "0.heads": 1,
        "0.mlp": 3,
        "1.heads": 0,
        "1.mlp": 3,
    }
    # a quarter is 4: two neurons; z of layer 0 -1.16, -0.39, of layer 1 -0.52, -0.50
    assert al_mm(units, 0.25, {"heads": 1})["0.mlp"] == 1
    assert al_mm(units, 0.25, {"heads": 1})["1.mlp"] == 1
    assert al_mm(units, 0.25, {"heads": 0})["1.mlp"] == 3


def test_manual_counts_that_are_impossible() -> None:
    units = [heads(0, [[1.0]] * 4, cost=10.0), neurons(0, [1.0] * 10)]
    for rule in (ul_mm, al_mm):
        with pytest.raises(UsageError, match="manual counts alone exceed the budget"):
            rule(units, 0.1, {"heads": 1})
        for manual in ({}, {"heads": 1, "mlp": 1}, {"head": 1}, {"heads": -1}):
            with pytest.raises(UsageError, match="all kinds but one of heads, mlp"):
                rule(units, 0.5, manual)


# --- FLAP: one ranking -----------------------------------------------------------------


def test_al_am_by_hand() -> None:
    """Standardised: neurons 0 at -1, 0, 1; neurons 1 at -0.58, -0.58, 1.15; a head -0.7."""
    units = [
        neurons(0, [1.0, 2.0, 3.0]),
        neurons(1, [0.0, 0.0, 9.0]),
        heads(1, [[0.0], [1.0]]),
    ]
    # order: 0.mlp (-1, cost 1), 1.heads (-0.71, cost 2), 1.mlp twice, 0.mlp (0); total 10
    expected = [
        (0.04, (0, 0, 0)),
        (0.1, (1, 0, 0)),
        (0.3, (1, 0, 1)),
        (0.4, (1, 1, 1)),
        (0.5, (1, 2, 1)),
        (0.6, (2, 2, 1)),
    ]
    for fraction, counts in expected:
        assert tuple(al_am(units, fraction).values()) == counts, fraction


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7])
def test_al_am_hits_the_ratio_within_half_a_head(fraction: float) -> None:
    units = random_model()
    removed = al_am(units, fraction)
    aim = fraction * sum(u.total for u in units)
    assert abs(cost_of(units, removed) - aim) <= 20 / 2
    assert all(0 <= removed[u.name] < u.count for u in units)


def test_al_am_is_adaptive() -> None:
    counts = al_am(random_model(), 0.3)
    assert len({n for name, n in counts.items() if name.endswith("mlp")}) > 1


def test_a_head_costs_512_thirds_of_a_neuron() -> None:
    """MHA LLaMA-7B: removing one head or 170 or 171 neurons is the same to the ranking."""
    assert Fraction(HEAD_COST, NEURON_COST) == Fraction(512, 3)
    scores = torch.full((2, HEAD), 1.0)
    scores[0] = 0.0
    line = torch.linspace(0, 1, INNER)  # z from -1.73: all below the head's -1 go first
    units = [
        Units("h", "0", "heads", scores, HEAD_COST),
        Units("m", "0", "mlp", line, NEURON_COST),
    ]
    before = int((units[1].standardised() < units[0].standardised()[0]).sum())
    total = 2 * Fraction(512, 3) + INNER
    assert al_am(units, Fraction(before) / total) == {"h": 0, "m": before}
    assert al_am(units, (before + Fraction(512, 3)) / total) == {"h": 1, "m": before}
    assert al_am(units, (before + 181) / total) == {"h": 1, "m": before + 10}


def test_grouped_queries_count_as_one_unit() -> None:
    """Two heads of keys and values with two queries each: the mean over all channels."""
    z = heads(0, [[0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 2.0, 2.0]]).standardised()
    assert z.tolist() == [0.0, 0.0]
    units = [
        heads(0, [[0.0, 0.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0]], cost=6.0),
        neurons(0, [1.0, 1.0, 1.0]),
    ]
    expected = 1.5 / math.sqrt(22 / 7)
    assert units[0].standardised().tolist() == pytest.approx([-expected, expected])
    assert al_am(units, 0.4) == {"0.heads": 1, "0.mlp": 0}


def test_constant_scores_are_no_reason_to_prune() -> None:
    """Their deviation is zero: they count as average, whatever rounding says."""
    assert heads(0, [[0.1] * 3] * 3).standardised().tolist() == [0.0] * 3
    units = [neurons(0, [0.1] * 3), neurons(1, [1.0, 2.0, 3.0, 9.0])]
    assert al_am(units, 2 / 7) == {"0.mlp": 0, "1.mlp": 2}
    assert al_am([neurons(0, [5.0]), neurons(1, [1.0, 2.0])], 1 / 3)["1.mlp"] == 1


def test_the_best_unit_stays() -> None:
    """The single unit of layer 0 has z = 0, and one of layer 1 that goes has more."""
    units = [neurons(0, [5.0]), neurons(1, [1.0, 2.0, 3.0, 8.0, 9.0])]
    assert al_am(units, 4 / 6) == {"0.mlp": 0, "1.mlp": 4}
    with pytest.raises(UsageError, match="out of reach"):
        al_am(units, 5 / 6)


def test_standardised_scores_ignore_scale_and_shift() -> None:
    units = random_model(layers=2)
    moved = [
        Units(u.name, u.layer, u.kind, u.scores * 10 ** (3 * i) + i, u.cost)
        for i, u in enumerate(units)
    ]
    assert al_am(moved, 0.35) == al_am(units, 0.35)


# --- FLAP as published ------------------------------------------------------------------


def test_compat_removes_the_unit_at_the_threshold_and_its_ties() -> None:
    """Only scores above the threshold stay: for 2 of 8, three units with one score go."""
    units = [neurons(0, [1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0])]
    assert al_am(units, 2 / 8) == {"0.mlp": 2}
    assert al_am(units, 2 / 8, compat=True) == {"0.mlp": 4}


def test_compat_squares_the_scores_of_heads() -> None:
    """Squares of 1, 2, 10 have means below those of 1, 2, 10 once standardised."""
    scores = [[1.0], [7.0], [10.0]]
    plain, squared = (
        heads(0, scores).standardised(squared=squared) for squared in (False, True)
    )
    # mean 6, deviations -5, 1, 4; squared: mean 50, deviations -49, -1, 50
    assert plain[1] == pytest.approx(1 / math.sqrt(21))
    assert squared[1] == pytest.approx(-1 / math.sqrt((49**2 + 1 + 50**2) / 2))
    units = [heads(0, scores, cost=1.0), neurons(0, [0.0, 4.9, 7.1, 9.0, 10.0, 11.0])]
    # neurons: z of 4.9 is -0.5, of 7.1 0.02, between those of the head; three of nine go
    assert al_am(units, 3 / 9) == {"0.heads": 1, "0.mlp": 2}
    assert al_am(units, 3 / 9, compat=True) == {"0.heads": 2, "0.mlp": 2}


def test_compat_leaves_one_unit() -> None:
    units = [neurons(0, [1.0, 1.0, 1.0]), neurons(1, [1.0, 1.0])]
    assert al_am(units, 0.2, compat=True) == {"0.mlp": 2, "1.mlp": 1}


# --- refusals --------------------------------------------------------------------------

RULES: dict[str, Callable[..., dict[str, int]]] = {
    "uniform": uniform,
    "fasp": lambda units, s: fasp(units, s, 100.0),
    "ul-mm": lambda units, s: ul_mm(units, s, {"heads": 0}),
    "al-mm": lambda units, s: al_mm(units, s, {"heads": 0}),
    "al-am": al_am,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_fraction_must_be_one(rule: str, fraction: float) -> None:
    with pytest.raises(UsageError, match=r"must lie in \[0, 1\)"):
        RULES[rule](random_model(), fraction)


def test_al_am_says_what_is_possible() -> None:
    with pytest.raises(
        UsageError, match=r"0\.9 of 20 is out of reach: .* at most 16 can be removed"
    ):
        al_am([heads(0, [[1.0]] * 5), neurons(0, [1.0] * 5, cost=2.0)], 0.9)


def test_impossible_units() -> None:
    with pytest.raises(UsageError, match=r"0\.mlp: scores must be finite, of shape"):
        neurons(0, [1.0, math.nan])
    with pytest.raises(UsageError, match=r"0\.mlp: a unit costs 0"):
        neurons(0, [1.0], cost=0)
