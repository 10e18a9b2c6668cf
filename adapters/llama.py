"""LLaMA and the families whose blocks have the same linears: Mistral, Qwen2, Qwen3.

Grouped-query attention changes only the number of rows of k and v. Sliding windows change
only the mask that the model passes to the block. The head norms of Qwen3 come after q and
k, and all heads share them. The families differ in the biases that their stock formats
allow.
"""

from dataclasses import replace

from layerwise.adapters.base import Adapter, Stage
from layerwise.adapters.couplings import BiasFlag, Coupling

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
MLP_BIAS = BiasFlag("mlp_bias", (*GATED, "mlp.down_proj"))
ATTENTION_BIAS = BiasFlag("attention_bias", (*PROJECTIONS, "self_attn.o_proj"))


def _couplings(mlp: BiasFlag | None, attention: BiasFlag | None) -> tuple[Coupling, ...]:
    return (
        Coupling(
            "mlp",
            ("mlp.down_proj",),
            GATED,
            stock={"intermediate_size": "units"},
            attributes={"mlp.intermediate_size": "units"},
            bias=mlp,
        ),
        Coupling(
            "heads",
            ("self_attn.o_proj",),
            PROJECTIONS,
            unit="head",
            head_dim="self_attn.head_dim",
            stock={
                "num_attention_heads": "query_heads",
                "num_key_value_heads": "units",
                "head_dim": "head_dim",
            },
            bias=attention,
        ),
        Coupling(
            "values",
            ("self_attn.o_proj",),
            ("self_attn.v_proj",),
            unit="value",
            head_dim="self_attn.head_dim",
            bias=attention,
        ),
    )


LLAMA = Adapter(
    name="LLaMA",
    blocks="model.layers",
    stages=(
        Stage(PROJECTIONS),
        Stage(("self_attn.o_proj",)),
        Stage(GATED),
        Stage(("mlp.down_proj",)),
    ),
    couplings=_couplings(MLP_BIAS, ATTENTION_BIAS),
)

MISTRAL = replace(LLAMA, name="Mistral", couplings=_couplings(None, None))
QWEN2 = replace(LLAMA, name="Qwen2", couplings=_couplings(None, None))
QWEN3 = replace(LLAMA, name="Qwen3", couplings=_couplings(None, ATTENTION_BIAS))
