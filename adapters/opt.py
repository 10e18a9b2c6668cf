"""OPT: attention with biases, then two linears around a ReLU.

The 350M variant normalises after the residual and projects its embeddings. Both happen
outside the linears of a block, so the declaration is the same.

Transformers computes the size of a head from the hidden size. So the stock format does not
allow fewer heads, although the attention module does.
"""

from layerwise.adapters.base import Adapter, Stage
from layerwise.adapters.couplings import BiasFlag, Coupling

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BIAS = BiasFlag("enable_bias", (*PROJECTIONS, "self_attn.out_proj", "fc1", "fc2"))

OPT = Adapter(
    name="OPT",
    blocks="model.decoder.layers",
    stages=(
        Stage(PROJECTIONS),
        Stage(("self_attn.out_proj",)),
        Stage(("fc1",)),
        Stage(("fc2",)),
    ),
    couplings=(
        Coupling("mlp", ("fc2",), ("fc1",), stock={"ffn_dim": "units"}, bias=BIAS),
        Coupling(
            "heads",
            ("self_attn.out_proj",),
            PROJECTIONS,
            unit="head",
            head_dim="self_attn.head_dim",
            attributes={"self_attn.num_heads": "query_heads"},
            bias=BIAS,
        ),
        Coupling(
            "values",
            ("self_attn.out_proj",),
            ("self_attn.v_proj",),
            unit="value",
            head_dim="self_attn.head_dim",
            bias=BIAS,
        ),
    ),
)
