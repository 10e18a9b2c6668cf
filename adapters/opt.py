"""OPT: attention with biases, then two linears around a ReLU.

The 350M variant normalises after the residual and projects its embeddings; both happen
outside the linears of a block, so the declaration is the same.
"""

from layerwise.adapters.base import Adapter, Stage

OPT = Adapter(
    name="OPT",
    blocks="model.decoder.layers",
    stages=(
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stage(("self_attn.out_proj",)),
        Stage(("fc1",)),
        Stage(("fc2",)),
    ),
)
