"""Which class of transformers opens a configuration: the language model, or the whole.

A multimodal model is opened by its own class, with its vision and audio parts. Some
configurations belong to two classes; then ``architectures`` says which one was stored.
"""

from typing import Any

from layerwise.errors import UnsupportedModelError
from layerwise.run.checkpoints.storage import Checkpoint


def auto_class_of(config: Any) -> Any:
    """Auto class of transformers that opens a configuration; None if there is none."""
    return _chosen(config)[0]


def class_of(config: Any) -> Any:
    """Class of the model of a configuration; None if there is none."""
    return _chosen(config)[1]


def refuse_other_kinds(checkpoint: Checkpoint, config: Any) -> None:
    """Refuse a configuration that does not describe a decoder of text.

    Raises
    ------
    UnsupportedModelError
        With the reason.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and (
        getattr(config, "is_decoder", None) is False
    )
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "it has an encoder, and its decoder reads the output of the encoder"
    elif is_encoder:
        reason = "config.json describes an encoder (is_decoder is false)"
    elif auto_class_of(config) is None:
        reason = "transformers has no such class for it"
    if reason is not None:
        message = (
            f"model type {config.model_type!r} in {checkpoint.path} is not a causal "
            f"language model: {reason}; choose a text-generation checkpoint"
        )
        raise UnsupportedModelError(message)


def _chosen(config: Any) -> tuple[Any, Any]:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    known = [
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
    ]
    kinds = [
        (auto, models[type(config)]) for auto, models in known if type(config) in models
    ]
    names = config.architectures or ()
    stored = [(auto, kind) for auto, kind in kinds if kind.__name__ in names]
    return next(iter([*stored, *kinds]), (None, None))
