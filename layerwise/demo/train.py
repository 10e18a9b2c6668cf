"""Train the packaged models from scratch: ``python -m layerwise.demo.train llama``.

This script made the packaged models, with seed 0. The last columns are perplexities on the
held-out text: dense, and with the smallest weights of every row set to zero.

======  ==========  =====  =======  =====  ==========  ==========
model   parameters  steps  minutes  dense  50 % zeros  70 % zeros
======  ==========  =====  =======  =====  ==========  ==========
opt        570 624   3500       23  25.12       31.23       64.86
llama    1 000 576   4000       38  19.17       24.86       68.90
mamba      597 632   1200       50  26.94       36.95      107.06
======  ==========  =====  =======  =====  ==========  ==========

The models are small and trained for long on purpose. A larger model, or one trained on less
text, loses little when half its weights are removed, and so shows no difference between
methods. The minutes are for one or two busy CPU cores. Rounding, and so the last digits,
depend on the number of threads.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from layerwise.adapters.selective_scan import fast_scan
from layerwise.demo import MODELS, calibration_text, evaluation_text

CONTEXT: Final = 256  # tokens
BATCH: Final = 8  # windows of CONTEXT tokens per step
VOCABULARY: Final = 1024
END: Final = "<|endoftext|>"  # the one special token: start, end and padding

STEPS: Final = {"opt": 3500, "llama": 4000, "mamba": 1200}
LEARNING_RATE: Final = 3e-3
WARM_UP: Final = 100  # steps
WEIGHT_DECAY: Final = 0.1
REPORT_EVERY: Final = 50  # steps

SPECIAL_TOKENS: Final[dict[str, Any]] = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS: Final = {
    "opt": OPTConfig(
        hidden_size=96,
        word_embed_proj_dim=96,
        ffn_dim=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        vocab_size=VOCABULARY,
        **SPECIAL_TOKENS,
    ),
    "llama": LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCABULARY,
        **SPECIAL_TOKENS,
    ),
    "mamba": MambaConfig(
        hidden_size=128,
        state_size=16,
        num_hidden_layers=4,
        vocab_size=VOCABULARY,
        **SPECIAL_TOKENS,
    ),
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: it encodes any text, and decoding restores the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def train(model: Any, tokens: Tensor, steps: int, seed: int) -> None:
    """Minimise the next-token loss over random windows of `tokens`, in place.

    AdamW with a linear warm-up and a cosine decay to zero. Only matrices have weight decay;
    gradients are clipped to norm one.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(CONTEXT)
    start, total = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        first = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
        batch = tokens[first + window]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % REPORT_EVERY == 0:
            minutes = (time.monotonic() - start) / 60
            mean, total = total / REPORT_EVERY, 0.0
            print(f"step {step:5d}  loss {mean:.3f}  {minutes:.1f} min", flush=True)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """Perplexity over consecutive windows of `tokens`, without an incomplete last one."""
    model.eval()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [
        len(batch) * model(input_ids=batch, labels=batch).loss.item()
        for batch in torch.split(windows, BATCH)
    ]
    return math.exp(sum(losses) / len(windows))


def main() -> None:
    """Train the models named on the command line, and save them."""
    parser = argparse.ArgumentParser(prog="python -m layerwise.demo.train")
    parser.add_argument("model", nargs="?", default="all", choices=(*MODELS, "all"))
    parser.add_argument("--steps", type=int, help="default: enough for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()

    tokenizer = train_tokenizer(calibration_text())
    tokens = torch.tensor(tokenizer.encode(calibration_text()))
    held_out = torch.tensor(tokenizer.encode(evaluation_text()))
    print(f"{len(tokens)} tokens to train on, {len(held_out)} held out")
    for name in MODELS if arguments.model == "all" else (arguments.model,):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)
            model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
        print(f"{name}: {model.num_parameters()} parameters")
        with fast_scan(model, torch.device("cpu")):
            train(model, tokens, arguments.steps or STEPS[name], arguments.seed)
        folder = arguments.output / name
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        print(f"{name}: perplexity {perplexity(model, held_out):.2f}, saved in {folder}")


if __name__ == "__main__":
    main()
