"""LLaMA and the families whose blocks have the same linears: Mistral, Qwen2, Qwen3.

Grouped-query attention only changes the number of rows of k and v, sliding windows only
the mask that the model hands to the block, and the head norms of Qwen3 lie after q and k.
"""

from layerwise.adapters.base import Adapter, Stage

LLAMA = Adapter(
    name="LLaMA",
    blocks="model.layers",
    stages=(
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stage(("self_attn.o_proj",)),
        Stage(("mlp.gate_proj", "mlp.up_proj")),
        Stage(("mlp.down_proj",)),
    ),
)
