"""Mamba, Falcon Mamba and Mamba-2: state space models whose blocks hold one mixer.

Transformers multiplies by ``dt_proj.weight`` without calling ``dt_proj``, so a hook on it
never runs. Its inputs are the first ``time_step_rank`` channels of the output of
``x_proj``; Falcon Mamba normalises them first. Mamba-2 has no ``dt_proj``: its time steps
are channels of ``in_proj``. The depthwise convolution and the state matrices have few
weights and stay dense.

The other three linears are called, but only in evaluation mode: fused training kernels use
the raw weights.

The inner channels of Mamba and Falcon Mamba pass separately through convolution, scan and
gate; only ``x_proj`` and ``out_proj`` combine them. So any channel can be removed. No
channels are declared for Mamba-2. Its gated norm before ``out_proj`` divides by a mean over
all channels, so a channel with zero weights in ``out_proj`` still has an effect.

References
----------
.. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
   COLM 2024, arXiv:2312.00752 (section 3.6: the projections of a block).
.. [2] T. Dao, A. Gu, "Transformers are SSMs", ICML 2024, arXiv:2405.21060 (section 7.1).
"""

from layerwise.adapters.base import Adapter, OutputSlice, Stage
from layerwise.adapters.couplings import BiasFlag, Coupling

INNER = Coupling(
    "inner",
    ("mixer.x_proj", "mixer.out_proj"),
    ("mixer.in_proj", "mixer.conv1d", "mixer.dt_proj", "mixer.A_log", "mixer.D"),
    stretches={"mixer.in_proj": 2},  # the input of the scan, then the gate
    stock={"intermediate_size": "units"},
    attributes={"mixer.intermediate_size": "units"},
    bias=BiasFlag("use_bias", ("mixer.in_proj", "mixer.out_proj"), "mixer.use_bias"),
)

MAMBA = Adapter(
    name="Mamba",
    blocks="backbone.layers",
    stages=(
        Stage(("mixer.in_proj",)),
        Stage(("mixer.x_proj",)),
        Stage(("mixer.dt_proj",), source=OutputSlice("mixer.x_proj")),
        Stage(("mixer.out_proj",)),
    ),
    couplings=(INNER,),
)

FALCON_MAMBA = Adapter(
    name="Falcon Mamba",
    blocks="backbone.layers",
    stages=(
        Stage(("mixer.in_proj",)),
        Stage(("mixer.x_proj",)),
        Stage(("mixer.dt_proj",), source=OutputSlice("mixer.dt_layernorm")),
        Stage(("mixer.out_proj",)),
    ),
    couplings=(INNER,),
)

MAMBA2 = Adapter(
    name="Mamba-2",
    blocks="backbone.layers",
    stages=(Stage(("mixer.in_proj",)), Stage(("mixer.out_proj",))),
)
