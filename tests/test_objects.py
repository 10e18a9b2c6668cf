"""Model objects that cannot be pruned as they are: refused untouched, with what to call."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.nn.utils import prune as of_torch
from transformers import AutoTokenizer

from layerwise.errors import DataError, UnsupportedModelError
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models import loading
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.objects import check_object
from tests.support.models import Decoder, blocks_of, save_checkpoint, tiny_model
from tests.support.pruning import prune as prune_object
from tests.support.retraining import TOKENS, retrain

prune: Any = of_torch
quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic


def masked(model: Any) -> None:
    for block in blocks_of(model):
        prune.l1_unstructured(block.mlp.down_proj, "weight", 0.3)


def normed(model: Any) -> None:
    parametrizations.weight_norm(blocks_of(model)[1].mlp.down_proj)


def normed_in_a_hook(model: Any) -> None:
    spectral_norm(blocks_of(model)[1].self_attn.o_proj)


def offloaded(model: Any) -> None:
    blocks_of(model)[1].to("meta")


def without_weights(model: Any) -> None:
    model.to("meta")


def integers(model: Any) -> None:
    """As bitsandbytes stores them: a Linear whose weight holds codes."""
    linear = blocks_of(model)[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


class Codes(Tensor):
    """As torchao stores them: a kind of tensor of its own that says it is floating."""


def coded(model: Any) -> None:
    linear = blocks_of(model)[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Codes))


def quantised(model: Any) -> None:
    quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


STATES: Mapping[str, tuple[Callable[[Any], None], str]] = {
    "prune": (masked, r"0\.mlp\.down_proj .*torch\.nn\.utils\.prune\.remove\(module"),
    "weight_norm": (normed, r"1\.mlp\.down_proj .*remove_parametrizations\(module"),
    "spectral_norm": (normed_in_a_hook, r"1\.self_attn\.o_proj .*remove_spectral_norm"),
    "offloaded": (offloaded, r"layers\.1\..* has no values .*give the folder"),
    "meta": (without_weights, r"embed_tokens\.weight has no values .*give the folder"),
    "integers": (integers, r"1\.mlp\.down_proj\.weight has values of type int8"),
    "codes": (coded, r"0\.mlp\.up_proj\.weight is a Codes"),
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_without_plain_weights_is_refused(state: str, tmp_path: Path) -> None:
    change, message = STATES[state]
    model = tiny_model("llama")
    change(model)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.is_meta}
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        prune_object(model, output_dir=tmp_path / "out")
    assert "\n" not in str(caught.value)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_quantised_linears_are_refused() -> None:
    model = tiny_model("llama")
    quantised(model)
    with pytest.raises(UnsupportedModelError, match="q_proj is quantised"):
        prune_object(model)


def test_a_family_without_declared_adapter_is_refused_too() -> None:
    model = tiny_model("gpt_neox")
    prune.random_unstructured(blocks_of(model)[0].mlp.dense_h_to_4h, "weight", 0.5)
    with pytest.raises(UnsupportedModelError, match=r"prune\.remove"):
        prune_object(model)


def test_what_the_message_says_helps() -> None:
    model = tiny_model("llama")
    masked(model)
    for block in blocks_of(model):
        prune.remove(block.mlp.down_proj, "weight")
    assert len(prune_object(model).records) == 14


def test_a_computed_weight_outside_the_blocks_does_not_matter() -> None:
    model = tiny_model("llama")
    parametrizations.weight_norm(model.lm_head)
    check_object(model)


def test_wrappers_are_refused_with_the_attribute_to_give() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"DataParallel .* attribute module"):
        prune_object(nn.DataParallel(model))
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule .* _orig_mod"):
        prune_object(torch.compile(model, backend="eager"))


@pytest.mark.filterwarnings("ignore")  # peft calls deprecated functions
def test_a_lora_object_must_be_merged() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(UnsupportedModelError, match=r"merge_and_unload\(\)"):
            prune_object(model)
    assert len(prune_object(wrapped.merge_and_unload()).records) == 14


def test_a_retraining_refuses_the_same_objects() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    masks = prune_object(model).masks
    offloaded(dense)
    with pytest.raises(UnsupportedModelError, match="has no values"):
        retrain(model, masks=masks, dense=dense, calibration=TOKENS)


class Rescaled(Decoder):
    """Divides a weight when it runs, as RWKV does."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        self.layers[1].second.weight.data.div_(2)  # type: ignore[union-attr,operator]
        return super().forward(input_ids, use_cache)


class Replaced(Decoder):
    """Writes through `out`."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        weight = self.layers[0].first.weight  # type: ignore[union-attr]
        torch.mul(weight.detach(), 2, out=weight.data)  # type: ignore[arg-type,operator]
        return super().forward(input_ids, use_cache)


@pytest.mark.parametrize("kind", [Rescaled, Replaced])
def test_a_model_that_changes_its_weights_comes_back_unchanged(kind: type[Decoder]) -> None:
    model = kind()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"changes layers\.\d\..*weight in its"):
        prune_object(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("with_model", [True, False])
def test_adapters_of_peft_are_refused(with_model: bool, tmp_path: Path) -> None:
    if with_model:
        save_checkpoint(tmp_path, tiny_model("llama"), tokenizer=False)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    says = "beside a model.* move adapter_config" if with_model else r"merge_and_unload\(\)"
    with pytest.raises(DataError, match=says):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "package"),
    [(b"\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", True), (b"IQ== 0\n", False)],
)
def test_sentencepiece_is_named_where_it_is_missing(
    content: bytes, package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, tiny_model("llama"), tokenizer=False)
    (tmp_path / "tokenizer.model").write_bytes(content)

    def failing(*args: Any, **options: Any) -> Any:
        message = "`tiktoken` is required to read a `tiktoken` file"
        raise ImportError(message)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", failing)
    monkeypatch.setattr(loading, "_has_sentencepiece", lambda: False)
    with pytest.raises(DataError) as caught:
        load_tokenizer(Checkpoint.open(tmp_path))
    expected = "pip install sentencepiece" if package else "tiktoken"
    assert expected in str(caught.value)
    assert ("tiktoken" in str(caught.value)) != package
