"""Mamba, Falcon Mamba and Mamba-2: state space models whose blocks hold one mixer.

Transformers multiplies by ``dt_proj.weight`` without calling ``dt_proj``, so a hook on it
never fires. Its inputs are the first ``time_step_rank`` channels of what ``x_proj``
returns; Falcon Mamba normalises them before. Mamba-2 has no ``dt_proj``: its time steps
are channels of ``in_proj``. The depthwise convolution and the state matrices hold few
weights and stay dense.

The other three are called, in evaluation mode only: fused training kernels take the raw
weights.

References
----------
.. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
   COLM 2024, arXiv:2312.00752 (section 3.6: the projections of a block).
.. [2] T. Dao, A. Gu, "Transformers are SSMs", ICML 2024, arXiv:2405.21060 (section 7.1).
"""

from layerwise.adapters.base import Adapter, OutputSlice, Stage

MAMBA = Adapter(
    name="Mamba",
    blocks="backbone.layers",
    stages=(
        Stage(("mixer.in_proj",)),
        Stage(("mixer.x_proj",)),
        Stage(("mixer.dt_proj",), source=OutputSlice("mixer.x_proj")),
        Stage(("mixer.out_proj",)),
    ),
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
)

MAMBA2 = Adapter(
    name="Mamba-2",
    blocks="backbone.layers",
    stages=(Stage(("mixer.in_proj",)), Stage(("mixer.out_proj",))),
)
