"""Moments: streaming equals batch, half precision survives, bad numbers are named."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise import gram
from layerwise.accumulator import MomentAccumulator
from layerwise.errors import InvalidProblemError
from layerwise.gram import BLOCKS, SMALLEST_BLOCK, add_gram, exact_bfloat16, mirrored
from layerwise.moments import Moments
from layerwise.patterns import Unstructured
from layerwise.shifted import Shifted
from tests.support.problems import DEAD_CHANNEL, PROBLEMS, Layer, layers, make_layer
from tests.support.tolerances import MOMENTS, ROUNDING, SUM_OF_SQUARES


def collect(layer: Layer, cuts: tuple[int, ...] = ()) -> tuple[Moments, Tensor | None]:
    """Moments of a layer, its tokens given in chunks that end at the cuts."""
    tokens = layer.inputs.shape[1]
    accumulator = MomentAccumulator(layer.shape[1], [layer.weight])
    for begin, end in pairwise((0, *cuts, tokens)):
        other = layer.pruned_inputs
        accumulator.update(
            layer.inputs.T[begin:end], None if other is None else other.T[begin:end]
        )
    return accumulator.moments(), accumulator.drift(0)


def assert_near(found: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    assert found is not None
    assert found.dtype == torch.float64
    limit = MOMENTS[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("name", PROBLEMS)
def test_moments_are_the_definition(name: str) -> None:
    layer = PROBLEMS[name]
    found, drift = collect(layer)
    dense, seen = layer.inputs.double(), layer.seen.double()
    tokens = seen.shape[1]
    dtype = torch.float64 if layer.inputs.dtype == torch.float64 else torch.float32
    assert found.n_tokens == tokens
    assert_near(found.gram, seen @ seen.T / tokens, dtype)
    assert_near(found.input_mean, dense.mean(dim=1), dtype)
    if layer.pruned_inputs is None:
        assert found.cross_gram is None
        assert found.pruned_input_mean is None
        assert drift is None
    else:
        assert_near(found.cross_gram, dense @ seen.T / tokens, dtype)
        assert_near(found.pruned_input_mean, seen.mean(dim=1), dtype)
        change = layer.weight.double() @ (dense - seen)
        assert_near(drift, change.square().sum(dim=1) / tokens, dtype)


@given(data=st.data())
def test_chunks_equal_one_batch(data: st.DataObject) -> None:
    layer = data.draw(layers())
    tokens = layer.inputs.shape[1]
    cuts = data.draw(st.lists(st.integers(0, tokens), max_size=4).map(sorted), label="cuts")
    if data.draw(st.booleans(), label="float32"):
        layer = layer.to(torch.float32)
    dtype = layer.inputs.dtype
    (whole, drift), (parts, drift_of_parts) = collect(layer), collect(layer, tuple(cuts))
    assert parts.n_tokens == whole.n_tokens
    assert_near(parts.gram, whole.gram, dtype)
    assert whole.input_mean is not None
    assert parts.input_mean is not None
    # a mean may cancel, so it is measured by the size of what was averaged
    error = (parts.input_mean - whole.input_mean).abs().max()
    assert float(error) <= MOMENTS[dtype] * float(layer.inputs.abs().max())
    if whole.cross_gram is not None:
        assert drift is not None
        assert parts.cross_gram is not None
        size = layer.seen.abs().max() * layer.inputs.abs().max()
        error = (parts.cross_gram - whole.cross_gram).abs().max()
        assert float(error) <= MOMENTS[dtype] * float(size)
        assert_near(drift_of_parts, drift, dtype)


def test_tokens_in_any_number_of_dimensions() -> None:
    tokens = make_layer(1, width=6, tokens=24).inputs.T
    flat, stacked = MomentAccumulator(6), MomentAccumulator(6)
    flat.update(tokens)
    stacked.update(tokens.reshape(2, 3, 4, 6))
    assert torch.equal(flat.moments().gram, stacked.moments().gram)
    assert stacked.n_tokens == 24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_outliers_does_not_overflow(dtype: torch.dtype) -> None:
    inputs = make_layer(2, width=6, tokens=500).inputs
    inputs[3] *= 1e4  # squares beyond 65504, sums beyond 1e10
    inputs = inputs.to(dtype)
    assert float(inputs.abs().max()) ** 2 > torch.finfo(torch.float16).max
    accumulator = MomentAccumulator(6)
    accumulator.update(inputs.T)
    gram = accumulator.moments().gram
    exact = inputs.double() @ inputs.double().T / 500
    scale = exact.diagonal().sqrt()
    error = (gram - exact) / scale / scale[:, None]
    assert float(error.abs().max()) <= MOMENTS[torch.float32]


@pytest.mark.parametrize("exponent", [-60, 60])
def test_float32_squares_beyond_the_range_of_float32(exponent: int) -> None:
    inputs = make_layer(3, width=4, tokens=20).inputs.float()
    plain, scaled = MomentAccumulator(4), MomentAccumulator(4)
    plain.update(inputs.T)
    scaled.update(inputs.T * 2.0**exponent)
    factor = 4.0**exponent
    assert torch.equal(scaled.moments().gram, plain.moments().gram * factor)
    mean, scaled_mean = plain.moments().input_mean, scaled.moments().input_mean
    assert mean is not None
    assert scaled_mean is not None
    assert torch.equal(scaled_mean, mean * 2.0**exponent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_bad_activation_is_named(value: float, dtype: torch.dtype) -> None:
    tokens = make_layer(4, width=6, tokens=40).inputs.T.to(dtype)
    broken = tokens[20:].clone()
    broken[3, 5] = value
    accumulator = MomentAccumulator(6)
    accumulator.update(tokens[:20])
    with pytest.raises(
        InvalidProblemError, match=f"inputs contain {value} at token 23, ch"
    ):
        accumulator.update(broken)
    with pytest.raises(InvalidProblemError, match=r"pruned inputs contain .* channel 5"):
        MomentAccumulator(6).update(tokens[:20], broken)
    assert accumulator.n_tokens == 20  # nothing of the bad chunk was added
    gram = accumulator.moments().gram
    accumulator.update(tokens[20:])
    assert torch.isfinite(accumulator.moments().gram).all()
    assert not torch.equal(accumulator.moments().gram, gram)


def test_accumulator_refuses_what_it_cannot_mean() -> None:
    tokens = torch.ones(8, 4)
    both, one = MomentAccumulator(4), MomentAccumulator(4)
    both.update(tokens, tokens)
    one.update(tokens)
    with pytest.raises(InvalidProblemError, match="to every update of an accumulator"):
        both.update(tokens)
    with pytest.raises(InvalidProblemError, match="to every update of an accumulator"):
        one.update(tokens, tokens)
    with pytest.raises(InvalidProblemError, match="8 tokens, pruned inputs 7"):
        both.update(tokens, tokens[:7])
    # 32 numbers are also four tokens of width 8, or eight transposed ones
    with pytest.raises(InvalidProblemError, match=re.escape("(..., 4), got shape")):
        one.update(tokens.reshape(4, 8))
    with pytest.raises(InvalidProblemError, match=re.escape("got shape (4, 8)")):
        both.update(tokens, tokens.T)
    with pytest.raises(InvalidProblemError, match="got complex64"):
        one.update(tokens.to(torch.complex64))
    with pytest.raises(InvalidProblemError, match="calibration data are empty"):
        MomentAccumulator(4).moments()
    empty = MomentAccumulator(4)
    empty.update(tokens[:0])
    with pytest.raises(InvalidProblemError, match="calibration data are empty"):
        empty.moments()


def test_inputs_are_left_alone_and_gradients_stay_out() -> None:
    tokens = torch.ones(8, 4, requires_grad=True)
    accumulator = MomentAccumulator(4, [torch.ones(2, 4, requires_grad=True)])
    accumulator.update(tokens, 2 * tokens)
    assert not accumulator.moments().gram.requires_grad
    assert torch.equal(tokens.detach(), torch.ones(8, 4))


# -- moments given by hand -------------------------------------------------------------


def identity(**entries: float) -> Tensor:
    """Identity of width 4 with entries like ``g12=0.5`` changed."""
    gram = torch.eye(4, dtype=torch.float64)
    for name, value in entries.items():
        gram[int(name[1]), int(name[2])] = value
    return gram


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(4, 4), "gram is zero: every input is zero"),
        (torch.ones(4), "gram must be a square matrix, got shape (4,)"),
        (torch.ones(4, 3), "gram has shape (4, 3), expected (3, 3)"),
        (identity(g12=0.5), "gram is not symmetric: 0.5 at (1, 2), 0.0 at (2, 1)"),
        (identity(g22=-0.5), "gram has a negative diagonal: -0.5 at 2"),
        (identity(g13=1.5, g31=1.5), "|G[1, 3]| exceeds sqrt(G[1, 1] G[3, 3])"),
        (identity(g22=0.0, g23=0.1, g32=0.1), "|G[2, 3]| exceeds"),
        (identity(g30=float("nan")), "gram contains nan at (3, 0)"),
        (identity(g30=float("inf")), "gram contains inf at (3, 0)"),
    ],
)
def test_impossible_grams(gram: Tensor, message: str) -> None:
    with pytest.raises(InvalidProblemError, match=re.escape(message)):
        Moments(gram)


def test_impossible_companions_of_a_gram() -> None:
    gram = identity()
    with pytest.raises(InvalidProblemError, match=re.escape("cross_gram has shape (3, 3)")):
        Moments(gram, torch.eye(3))
    with pytest.raises(InvalidProblemError, match=re.escape("contains nan at (2, 1)")):
        Moments(gram, identity(g21=float("nan")))
    for name in ("input_mean", "pruned_input_mean"):
        with pytest.raises(InvalidProblemError, match=rf"{name} has shape \(3,\), exp"):
            Moments(gram, **{name: torch.ones(3)})  # type: ignore[arg-type]


def test_everything_is_kept_in_float64() -> None:
    half = torch.eye(4, dtype=torch.float16)
    moments = Moments(half, half, half[0], half[1])
    for tensor in (moments.gram, moments.cross_gram, moments.input_mean):
        assert tensor is not None
        assert tensor.dtype == torch.float64


@pytest.mark.parametrize(
    ("layer", "rank", "dead"),
    [
        (make_layer(1), 16, 0),
        (PROBLEMS["dead-channel"], 15, 1),
        (PROBLEMS["duplicate-channel"], 15, 0),
        (PROBLEMS["few-tokens"], 10, 0),
        (make_layer(1, tokens=10).to(torch.float32), 10, 0),
    ],
    ids=["full", "dead", "duplicate", "few tokens", "few tokens in float32"],
)
def test_rank_and_dead_channels(layer: Layer, rank: int, dead: int) -> None:
    moments = collect(layer)[0]
    assert moments.rank == rank
    assert moments.dead_channels == dead
    assert Moments(moments.gram).rank == rank  # without knowing the tokens
    assert moments.mean_diagonal == pytest.approx(float(moments.gram.trace()) / 16)


def test_dead_channel_has_zero_moments() -> None:
    gram = collect(PROBLEMS["dead-channel"])[0].gram
    assert not gram[DEAD_CHANNEL].any()
    assert not gram[:, DEAD_CHANNEL].any()


def test_factors_are_cached_per_damping() -> None:
    moments = collect(PROBLEMS["plain"])[0]
    first = moments.factor(0.01, torch.float64)
    assert moments.factor(0.01, torch.float64) is first
    assert moments.factor(0.1, torch.float64) is not first
    assert moments.factor(0.01, torch.float32) is not first
    reverse = moments.factor(0.01, torch.float64, reverse=True)
    upper = reverse.lower.flip(0, 1)
    product = first.lower @ first.lower.T
    torch.testing.assert_close(upper @ upper.T, product)
    assert not upper.tril(-1).any()


# -- means -----------------------------------------------------------------------------


def test_centered_moments_are_covariances() -> None:
    layer = make_layer(5, drift=0.3)
    offset = torch.arange(16, dtype=torch.float64)[:, None] / 4
    layer = Layer(layer.weight, layer.inputs + offset, layer.seen - 2 * offset)
    centered = collect(layer)[0].centered()
    dense = layer.inputs - layer.inputs.mean(dim=1, keepdim=True)
    seen = layer.seen - layer.seen.mean(dim=1, keepdim=True)
    torch.testing.assert_close(centered.gram, seen @ seen.T / 48)
    torch.testing.assert_close(centered.cross_gram, dense @ seen.T / 48)
    same = collect(Layer(layer.weight, layer.inputs))[0].centered()
    torch.testing.assert_close(same.gram, dense @ dense.T / 48)
    assert same.cross_gram is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_channels_have_no_variance(dtype: torch.dtype) -> None:
    inputs = make_layer(6, tokens=300).inputs
    inputs[2] = 3.7
    inputs[5] = 1000 + inputs[5] * 1e-2  # of which float32 has two digits
    inputs = inputs.to(dtype)
    accumulator = MomentAccumulator(16)
    accumulator.update(inputs.T)
    centered = accumulator.moments().centered()
    assert not centered.gram[2].any()
    assert not centered.gram[:, 2].any()
    assert centered.dead_channels == 1
    variance = float(inputs[5].double().var(correction=0))
    assert float(centered.gram[5, 5]) == pytest.approx(variance, rel=SUM_OF_SQUARES)


def test_centering_needs_the_means() -> None:
    with pytest.raises(InvalidProblemError, match="needs the means of the inputs"):
        Moments(identity()).centered()
    with pytest.raises(InvalidProblemError, match="needs the means of the inputs"):
        Moments(identity(), identity(), torch.zeros(4)).centered()


def test_scaled_moments_are_shared() -> None:
    moments = Moments(torch.eye(4, dtype=torch.float64))
    assert moments.scaled(4.0) is moments.scaled(4.0)
    assert moments.scaled(4.0) is not moments.scaled(16.0)
    assert moments.scaled(4.0).factor(0.01, torch.float64) is moments.scaled(4.0).factor(
        0.01, torch.float64
    )


@pytest.mark.parametrize("tokens", [1, 40])
def test_wide_grams_are_built_from_their_upper_triangle(tokens: int) -> None:
    """More than one block of columns, the last one shorter."""
    width = BLOCKS * SMALLEST_BLOCK + 50
    inputs = make_layer(68, rows=1, width=width, tokens=tokens).inputs
    total = torch.zeros(width, width, dtype=torch.float64)
    add_gram(total, Shifted(inputs.T), 0.25)
    add_gram(total, Shifted(inputs.T), 0.75)
    block = max(SMALLEST_BLOCK, -(-width // BLOCKS))
    assert not total[block:, :block].any()
    expected = inputs @ inputs.T
    limit = ROUNDING * float(expected.abs().max())
    torch.testing.assert_close(mirrored(total), expected, rtol=0, atol=limit)


def test_products_in_bfloat16_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that adds up products of bfloat16 in float32."""
    assert not exact_bfloat16(torch.device("cpu"))
    seen: list[torch.dtype] = []
    multiply = torch.mm

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        seen.extend((left.dtype, right.dtype, out_dtype))
        return multiply(left.float(), right.float())

    layer = make_layer(69, rows=3, width=12, tokens=60, drift=0.3).to(torch.bfloat16)
    assert layer.pruned_inputs is not None
    expected = layer.problem(Unstructured(0.5))
    monkeypatch.setattr(gram, "exact_bfloat16", lambda _: True)
    monkeypatch.setattr(torch, "mm", mm)
    found = layer.problem(Unstructured(0.5))
    assert set(seen) == {torch.bfloat16, torch.float32}
    for name in ("gram", "cross_gram", "drift"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_gram_that_is_symmetric_up_to_rounding_is_kept_symmetric() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    assert Moments(gram).gram.data_ptr() == gram.data_ptr()  # no copy of what is right
    gram[0, 1] = 5e-5
    kept = Moments(gram).gram
    assert torch.equal(kept, kept.T)
    assert float(kept[0, 1]) == pytest.approx(2.5e-5)
    assert float(gram[0, 1]) == 5e-5  # what was given is left alone
