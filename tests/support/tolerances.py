"""The only file with numeric tolerances, each with its reason.

Measured figures are the largest seen over the problems of ``tests/support/problems.py``.
Where a bound is per dtype, float64 and float32 differ by their rounding, not by their
reasons.
"""

import torch

# -- objectives, divided by the energy ||W X||^2 ---------------------------------------

# Two float64 evaluations of one sum of squares: round-off times a few hundred terms.
# Measured 4e-16.
ROUNDING = 1e-12

# Objective from moments against its definition. float64: round-off, measured 3e-16.
# float32: each product of the gram rounds at 6e-8 and averages out, measured 6e-8.
EXPLICIT = {torch.float64: 1e-12, torch.float32: 1e-6}

# Refit against CLARABEL: the tolerance that least-squares promises. Measured 4e-14.
REFIT_REFERENCE = 1e-8

# l1 objective against CLARABEL at a requested gap of 1e-9: the interior point method
# leaves up to 1e-12 at condition 1e8; the rest is head room for other platforms.
L1_REFERENCE = 1e-7

# SCIP stops at feasibility tolerances of 1e-6 on the weights and on the second-order cone,
# which moves its objective by as much. Measured 4e-7.
SCIP_REFERENCE = 1e-5

# Tight enough that CLARABEL is a reference for the bounds above.
CLARABEL_OPTIONS = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}

# Two orders of summation in the scan of Mamba, relative to the largest entry; in bfloat16
# the weights around it round. Measured 1e-6 and 3e-2.
FAST_SCAN = {torch.float32: 1e-5, torch.bfloat16: 1e-1}

# Claims against exact optima: the last steps of a certificate, after the part of it that
# counts rounding, are rounded too. Measured 0: no certificate needed it.
CLAIM = 1e-6

# Relative error of few tokens, whose square is 1e-13 of the energy: float64 rounding.
# Measured 2e-5.
FEW_TOKENS_ERROR = 1e-3

# -- iterative methods: the requested gap ----------------------------------------------

LASSO_GAP = 1e-9
LASSO_ITERATIONS = 20_000  # condition 1e8 takes about 3000

# -- linear algebra, relative to the largest entry -------------------------------------

# Closed form against closed form on damped, hence well conditioned, systems.
CLOSED_FORM = {torch.float64: 1e-9, torch.float32: 1e-4}

# One block of a sweep with its sums in another order, which later columns amplify by the
# condition of the block. Measured 3e-7 and 6e-16.
FUSED_SWEEP = {torch.float64: 1e-13, torch.float32: 1e-5}

# Moments against explicit products: float64 rounding, or that of float32 products.
MOMENTS = {torch.float64: 1e-13, torch.float32: 1e-6}

# KKT residual of a converged l1 solution over max|T|: square root of the gap, as f is
# quadratic in the residual; with LASSO_GAP, sqrt(1e-9) times a constant near one.
L1_STATIONARITY = 1e-4

# Normal equations of a refit over max|T|. float64: LAPACK's backward error; float32:
# weights are rounded to 24 bits once they are found.
REFIT_STATIONARITY = {torch.float64: 1e-10, torch.float32: 1e-5}

# Objective about means of 1e3 to 1e5 standard deviations, relative: eps times the square
# of their ratio, and the rounding of float32 products of the rest. Measured 2e-6.
FAR_MEANS = 1e-5

# Variance from a float64 second moment 1e10 times as large, relative. Measured 2e-6.
SUM_OF_SQUARES = 1e-4

# Objective of W plus a step of 1e-9: the sum itself rounds to 1e-7 of the step.
SMALL_STEP = 1e-6

# Largest value of a parabola on a grid of 4001 points, one part in 4000 off at most: the
# square of that, times the ratio of the curvature to the value.
GRID = 1e-5

# Power iteration runs 40 steps on a spectrum without a gap; a few percent is promised.
POWER_ITERATION = 0.05

# -- local search ----------------------------------------------------------------------

# Gain of the best single swap after a search without tolerance: the search takes changes
# below 1e-12 of the energy for rounding, the rest is the rounding of two refits.
LOCAL_MINIMUM = 1e-11

# Mean of the objective after exchanges of columns over that of the best set of columns, ten
# inputs: a local search need not find it. Measured over 40 layers: 1.008 at most, and 1.25
# for the worst layer; greedy removal alone 1.037 and 1.47.
COLUMNS_NEAR_BEST = 1.03

# Gain of the best exchange of columns where the search stops, relative to the objective:
# the millionth below which it is not made, and rounding.
COLUMN_EXCHANGE = 1.1e-6

# Costs of moving units after 600 updates at condition 1e8 and almost no damping.
LONG_WALK = 1e-3

# -- equivariance ----------------------------------------------------------------------

# Same problem in another order: BLAS may add in another order, rounding is amplified by
# the damped condition number, about 1e4 at most.
EQUIVARIANCE = 1e-9

# Share of mask entries on which float32 and float64 may differ: near-ties of scores.
MASK_DISAGREEMENT = 1e-3

# Damped objectives of MaskLoRA that must be ordered: rounding of float32 weights, and
# alternations that stop early at another rank.
LOW_RANK = 1e-3

# MaskLoRA of full rank against the refit: alternations stop at a gain of 1e-4.
WHOLE_CHANGE = 1e-3

# -- accelerators ----------------------------------------------------------------------

# Objective on CUDA against float64 on the CPU, divided by the energy; masks chosen from
# float32 scores may differ at near-ties, each of which costs next to nothing.
GPU_OBJECTIVE = {torch.float64: 1e-8, torch.float32: 1e-4}

# -- runs over a model -----------------------------------------------------------------

# Relative error in the log against W X - What Xhat in float64: activations of half
# precision are multiplied in float32, whose rounding averages out over the tokens.
RECORDED_ERROR = 1e-6

# Gradient norms of a float32 model against the same by another path, over the largest of
# the matrix: both round every gradient at 6e-8. Measured 8e-8.
GRADIENTS = 1e-6

# Largest difference of logits (of size one) between a masked model in float32 and the one
# without these channels: sums of fewer terms are added in another order. Measured 3e-6.
SURGERY = 1e-5

# Figures of a survey against the same by hand, relative: the losses of float32 passes are
# small differences. Measured 3e-6.
SURVEY = 1e-4

# Logits of a merged model against those of its parametrizations, over the largest: sums of
# float32 in the same order, whose factors are rounded once more. Measured 4e-7.
MERGED = 1e-5

# Moments near one of two ranks against those of one process: forty float64 products in
# another order. Measured 4e-16.
RANKS = 1e-13

# Relative errors of a run on two ranks against one process: its forward passes in float32
# take other batches of sequences, which round differently.
RANKS_ERROR = 1e-4

# -- allocation ------------------------------------------------------------------------

# Sums of a few float64 errors in another order; budgets may be missed by the same.
ALLOCATION = 1e-11

# Price against HiGHS (tolerances 1e-7) and against a difference over 2e-3 of errors near
# one, which rounds at 1e-13. Measured 2e-11.
ALLOCATION_PRICE = 1e-6

# -- optimizers ------------------------------------------------------------------------

# Entries of Q^T Q and relative residuals of a product that is exact but for rounding.
FACTORS = {torch.float32: 1e-6, torch.float64: 1e-14}

# Error rate of a truncated basis over the best of its rank: five iterations with six spare
# columns on spectra without a gap. Measured 4e-4.
NEAR_BEST = 0.01

# Mean error rate of one iteration from the previous factors over that of five from a random
# start, on moments that drift by a hundredth per step.
WARM_START = 0.01

# Float64 updates by factors of full rank against a dense second moment: the factors round.
FULL_RANK = 1e-9

# -- lower bounds ----------------------------------------------------------------------

# Bound over the optimum of grams without a remainder: D falls short of the gram by the
# millionth that proves it, times the squared error of the direction.
NEARLY_EXACT = 1e-5

# Best bound of a split by CLARABEL at its default tolerances of 1e-8.
PERSPECTIVE = 1e-6

# Bound of the direction that twenty steps find over the best bound of that split.
RELAXED = 0.98

# Median of bound over optimum on grams with damping 0.01, measured 0.75 to 0.95; and for a
# layer of three rows.
TYPICAL_BOUND = 0.6
