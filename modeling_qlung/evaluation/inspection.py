"""What a trained model makes of cycles: their embeddings, and where in a cycle it looks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..configuration_qlung import AST
from ..feature_extraction_qlung import QLungFeatureExtractor
from ..inference.attention import attention_map, inference_mode
from .plots import plot_attention, plot_embedding_map
from .tasks import Task

MAPPED = 1500  # embeddings in a map, drawn evenly from the parts
FEWEST_MAPPED, MOST_PARTS = 4, 7  # what t-SNE needs, and how many colours there are


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
    with inference_mode(model):
        for batch in cycles.select_columns("waveform").iter(batch_size):
            inputs = feature_extractor(
                [np.array(waveform, dtype=np.float32) for waveform in batch["waveform"]],
                sampling_rate=feature_extractor.sampling_rate,
                return_tensors="pt",
                device=model.device,
            )
            found.append(model(**inputs).pooler_output.float().cpu().numpy())
    return np.concatenate(found)
