"""Where in a waveform a model looks."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel

from ..configuration_qlung import AST
from ..feature_extraction_qlung import QLungFeatureExtractor

SPECIAL_TOKENS = 2  # AST's class and distillation tokens stand before the patches


def attention_map(
    model: PreTrainedModel, feature_extractor: QLungFeatureExtractor, waveform: ArrayLike
) -> NDArray[np.float32]:
    """Give the attention that each patch of a cycle is given in an AST's last layer, averaged over its heads.

    That of the tokens which are pooled: the mean of the class and distillation tokens' rows (`pooling="cls_dist"`), or
    of all tokens' (`"mean"`). It shows where the last layer reads, not what decided: earlier layers have mixed the
    patches already (Jain and Wallace 2019, "Attention is not explanation").

    Args:
        model: a `QLungModel` or `QLungForAudioClassification` on AST; mode and attention implementation are put back.
        feature_extractor: the checkpoint's.
        waveform: (samples,), at the feature extractor's rate.

    Returns:
        (time patches, frequency patches); with the special tokens' share, which is left out, they add up to 1.

    Raises:
        ValueError: the encoder is no AST.
    """
    encoder = model.config.audio_config
    if encoder.model_type != AST:
        raise ValueError(f"the encoder is {encoder.model_type}: attention over patches in time is that of {AST}")
    inputs = feature_extractor(
        np.array(waveform, dtype=np.float32),
        sampling_rate=feature_extractor.sampling_rate,
        return_tensors="pt",
        device=model.device,
    )
    with inference_mode(model), _eager_attention(model):
        attention = model(**inputs, output_attentions=True).attentions[-1][0].float().mean(dim=0)
    queries = attention if model.config.pooling == "mean" else attention[:SPECIAL_TOKENS]
    frequencies = (encoder.num_mel_bins - encoder.patch_size) // encoder.frequency_stride + 1
    return queries.mean(dim=0)[SPECIAL_TOKENS:].unflatten(0, (frequencies, -1)).T.cpu().numpy()


@contextmanager
def inference_mode(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model in evaluation mode, without gradients, and put its mode back."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Fused attention keeps no map of itself."""
    before = {"": model.config._attn_implementation, "audio_config": model.config.audio_config._attn_implementation}
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
