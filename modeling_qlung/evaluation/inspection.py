"""What a trained model makes of cycles: their embeddings, and where in a cycle it looks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedModel

from ..configuration_qlung import AST
from ..feature_extraction_qlung import QLungFeatureExtractor
from .plots import plot_attention, plot_embedding_map
from .tasks import Task

MAPPED = 1500  # embeddings in a map, drawn evenly from the parts
FEWEST_MAPPED, MOST_PARTS = 4, 7  # what t-SNE needs, and how many colours there are
SPECIAL_TOKENS = 2  # AST's class and distillation tokens stand before the patches


def draw_model(
    folder: Path,
    title: str,
    model: PreTrainedModel,
    feature_extractor: QLungFeatureExtractor,
    parts: Mapping[str, Dataset],
    task: Task,
) -> dict[str, str]:
    """Draw how a model embeds cycles, by class and by part, and where it attends in one, abnormal where there is such.

    Args:
        folder: where `embedding_map.png` and `attention.png` are written.
        title: of both figures.
        model: of the task's classes; on a CLAP tower, no attention is drawn.
        feature_extractor: the checkpoint's.
        parts: rows of `decode_cycles` by name of what they are, such as a split or a dataset. With more than 7 of them,
            or fewer than 4 labelled rows in all, no map is drawn.
        task: gives the classes; rows without one are left out.

    Returns:
        File names by caption.
    """
    rng, drawn, figures = np.random.default_rng(0), {}, {}
    for name, cycles in parts.items():
        labelled = np.flatnonzero([label is not None for label in cycles["label"][:]])
        if len(labelled):
            drawn[name] = cycles.select(np.sort(rng.permutation(labelled)[: MAPPED // len(parts)]))
    labels = [label for cycles in drawn.values() for label in cycles["label"][:]]
    groups = [name for name, cycles in drawn.items() for _ in range(len(cycles))]
    if len(labels) >= FEWEST_MAPPED and len(drawn) <= MOST_PARTS:
        points = np.concatenate([embeddings(model, feature_extractor, cycles) for cycles in drawn.values()])
        plot_embedding_map(points, labels, task.classes, groups, folder / "embedding_map.png", title, "part")
        figures["Embeddings (t-SNE)"] = "embedding_map.png"
    encoder = model.config.audio_config
    if encoder.model_type == AST and labels:
        last = list(drawn.values())[-1]
        row = last[int(np.argmax(np.array(last["label"][:]) > 0))]
        waveform = np.array(row["waveform"], dtype=np.float32)
        inputs = feature_extractor(waveform, sampling_rate=feature_extractor.sampling_rate, return_tensors="np")
        plot_attention(
            inputs["input_values"][0],
            attention_map(model, feature_extractor, waveform),
            folder / "attention.png",
            f"{title}: {row['recording_id']}, {task.classes[row['label']]}",
            patch_size=encoder.patch_size,
            time_stride=encoder.time_stride,
            frequency_stride=encoder.frequency_stride,
        )
        figures["Attention over one cycle"] = "attention.png"
    return figures


def embeddings(
    model: PreTrainedModel, feature_extractor: QLungFeatureExtractor, cycles: Dataset, batch_size: int = 32
) -> NDArray[np.float32]:
    """Embed cycles, as the head sees them.

    Args:
        model: a `QLungModel` or `QLungForAudioClassification`; its mode is put back afterwards.
        feature_extractor: the checkpoint's.
        cycles: rows of `decode_cycles`.
        batch_size: cycles per pass.

    Returns:
        (n, hidden size), in the order of `cycles`.
    """
    found = []
    with _inference(model):
        for batch in cycles.select_columns("waveform").iter(batch_size):
            inputs = feature_extractor(
                [np.array(waveform, dtype=np.float32) for waveform in batch["waveform"]],
                sampling_rate=feature_extractor.sampling_rate,
                return_tensors="pt",
                device=model.device,
            )
            found.append(model(**inputs).pooler_output.float().cpu().numpy())
    return np.concatenate(found)


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
    with _inference(model), _eager_attention(model):
        attention = model(**inputs, output_attentions=True).attentions[-1][0].float().mean(dim=0)
    queries = attention if model.config.pooling == "mean" else attention[:SPECIAL_TOKENS]
    frequencies = (encoder.num_mel_bins - encoder.patch_size) // encoder.frequency_stride + 1
    return queries.mean(dim=0)[SPECIAL_TOKENS:].unflatten(0, (frequencies, -1)).T.cpu().numpy()


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
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
