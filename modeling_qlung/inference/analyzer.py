"""From a recording of any length, rate and format to what is heard in it, how sure the model is, and how good it is."""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from ..configuration_qlung import QLungConfig
from ..feature_extraction_qlung import QLungFeatureExtractor
from ..modeling_qlung import QLungForAudioClassification
from .analysis import Analysis, QualityPart
from .attention import attention_map
from .audio import AudioSource, gain_to, open_audio, resample, resample_blocks
from .operating_points import FILE_NAME, OperatingPoints
from .precision import fastest_dtype
from .windows import consecutive_parts, merge_windows, sliding_windows, tap_sections

PART_S = 10.0  # the quality scores were fitted on recordings of about this length
SHORTEST_S = 0.002  # of a cycle: two samples at the lowest rate
SILENT_RANGE = 1e-4  # between the largest and the smallest sample: three steps of 16 bits


class LungSoundAnalyzer:
    """
    Finds abnormal lung sounds in recordings of any length, with a QLung classifier.

    Overlapping windows go through the checkpoint's own preparation and through the model; at each step of `hop`, the
    probabilities are the mean of those of the windows that cover it. A recording is read block by block: memory does
    not grow with its length.

        analyzer = LungSoundAnalyzer.from_pretrained("space/model")
        analysis = analyzer("recording.wav")
        for span in analysis.spans:
            print(span.start, span.end, span.label, span.probability)

    Args:
        model: a classifier one of whose classes is named normal.
        feature_extractor: the checkpoint's.
        operating_points: the checkpoint's, if it has any; they give `threshold`, `quality_threshold`, `window`, `hop`
            and `level`, otherwise 0.5, 0.5, 2 s, 0.5 s and None.

    Attributes:
        window: length of a window, in s; what is longer than the feature extractor's `duration` would be cut.
        hop: from one window to the next, in s.
        threshold: of P(abnormal) = 1 - P(normal), from which on a step is marked.
        quality_threshold: of a recording's quality, below which it cannot be told what is in it.
        level: RMS amplitude that every recording is brought to before the model hears it, so that how loud it was
            recorded does not count; None leaves it as it is, and saves a reading.
        batch_size: number of windows that go through the model together.

    Raises:
        ValueError: if no class is named normal.
    """

    def __init__(
        self,
        model: QLungForAudioClassification,
        feature_extractor: QLungFeatureExtractor,
        operating_points: OperatingPoints | None = None,
    ):
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        self.operating_points = operating_points
        self.classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
        names = [name.casefold() for name in self.classes]
        if "normal" not in names:
            raise ValueError(f"The model's classes are {', '.join(self.classes)}: one must be named normal.")
        self.normal = names.index("normal")
        points = operating_points
        self.window = min(points.window if points else 2.0, feature_extractor.duration)
        self.hop = min(points.hop if points else 0.5, self.window)
        self.threshold = points.threshold if points else 0.5
        self.quality_threshold = points.quality_threshold if points else 0.5
        self.level = points.level if points else None
        self.batch_size = 16
        self._attention = threading.Lock()  # looking at it switches how the model computes

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        **hub,
    ) -> "LungSoundAnalyzer":
        """Open a checkpoint of a classifier, with its feature extractor and its `operating_points.json` if it has one.

        No code of the checkpoint is run: this package's own classes open it.

        Args:
            pretrained_model_name_or_path: a Hub id or a folder.
            dtype: what to compute in; [`fastest_dtype`] of the device by default, whatever the weights are stored in.
            device: where the model runs.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, ... of Transformers' `from_pretrained`.

        Raises:
            OSError: if there is no such checkpoint.
            ValueError: if it is not a QLung classifier's, or its operating points cannot be read.
        """
        name = pretrained_model_name_or_path
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub)
        if not isinstance(config, QLungConfig):
            raise ValueError(f"{name} is a checkpoint of {config.model_type}: give one of a QLung classifier.")
        dtype = dtype or fastest_dtype(device)
        model = QLungForAudioClassification.from_pretrained(name, dtype=dtype, **hub).to(device)
        feature_extractor = QLungFeatureExtractor.from_pretrained(name, **hub)
        path = cached_file(name, FILE_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        return cls(model, feature_extractor, OperatingPoints.from_file(path) if path else None)

    def __call__(
        self,
        source: AudioSource,
        sampling_rate: int | None = None,
        threshold: float | None = None,
        cycles: Sequence[tuple[float, float]] | None = None,
    ) -> Analysis:
        """Analyze one recording.

        Args:
            source: a path, an open binary file or the bytes of one, or samples of shape (samples,) or
                (samples, channels), float in [-1, 1] or integers; see `open_audio` for the formats.
            sampling_rate: of samples, in Hz; a file names its own.
            threshold: instead of the analyzer's own; see also [`Analysis.at`].
            cycles: start and end of cycles, in s, to be scored instead of windows. Where a window fills the model's
                input, as in training on windows, each has the mean of the windows over its time; otherwise each is cut
                and resampled on its own, as in training on cycles, at most the feature extractor's `duration` of it.

        Raises:
            ValueError: if the source is not audio, empty, holds NaN, or lacks its rate; for a threshold outside of
                [0, 1], and for cycles that are not within the recording.
            FileNotFoundError: if there is no such file.
        """
        rate = self.feature_extractor.sampling_rate
        ear = _Ear(self.feature_extractor)
        gain = gain_to(self.level, source, sampling_rate)
        cut = cycles is not None and self.window < self.feature_extractor.duration
        with open_audio(source, sampling_rate) as (own_rate, blocks):
            if cycles is not None:
                sections_of(cycles, own_rate)
            if not cut:
                heard = ear.listen(blocks, own_rate)
                pieces = sliding_windows(heard, round(self.window * rate), round(self.hop * rate))
            else:
                pieces = self._cycles(blocks, own_rate, cycles or (), ear)
            places, lengths, probabilities = self._score(pieces, gain)
        if not cut:
            if not places:
                raise ValueError("The recording is too short: it does not hold one sample at the model's rate.")
            samples, probabilities = merge_windows(places, lengths, probabilities, round(self.hop * rate))
            edges = samples / rate
        else:
            probabilities = probabilities[np.argsort(places)]
        if cycles is not None:
            within = np.minimum(np.asarray(cycles, dtype=np.float64), ear.seconds)
            probabilities = probabilities if cut else average_steps(edges, probabilities, within)
            edges = within
        return Analysis(
            duration=ear.seconds,
            classes=self.classes,
            normal=self.normal,
            edges=edges,
            probabilities=probabilities,
            threshold=self.threshold if threshold is None else threshold,
            cycles=cycles is not None,
            quality=ear.quality,
            reasons=ear.reasons,
            quality_parts=ear.parts,
            can_tell=not ear.silent and (ear.quality is None or ear.quality >= self.quality_threshold),
        )

    def _cycles(
        self, blocks: Iterable[np.ndarray], rate: int, cycles: Sequence[tuple[float, float]], ear: "_Ear"
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Give index and waveform of each cycle while the recording is listened to."""
        found: list[tuple[int, np.ndarray]] = []
        done = 0
        for _ in ear.listen(tap_sections(blocks, sections_of(cycles, rate), found), rate):
            done += len(found)
            while found:
                index, waveform = found.pop()
                yield index, resample(waveform, rate, self.feature_extractor.sampling_rate)
        if done < len(cycles):
            raise ValueError(_too_late(len(cycles) - done, len(cycles)))

    @torch.inference_mode()
    def _score(
        self, pieces: Iterator[tuple[int, np.ndarray]], gain: np.float32
    ) -> tuple[list[int], list[int], np.ndarray]:
        """Give of each piece, brought to the level, its place, its length, and its probabilities (pieces, classes)."""
        places, lengths, probabilities = [], [], [np.empty((0, len(self.classes)))]
        while batch := list(islice(pieces, self.batch_size)):
            waveforms = [gain * waveform for _, waveform in batch]
            inputs = self.feature_extractor(
                waveforms,
                sampling_rate=self.feature_extractor.sampling_rate,
                return_tensors="pt",
                device=self.model.device,
            )
            places += [place for place, _ in batch]
            lengths += [len(waveform) for waveform in waveforms]
            probabilities.append(self.model(**inputs).logits.softmax(dim=-1).double().cpu().numpy())
        return places, lengths, np.concatenate(probabilities)

    def attention(self, source: AudioSource, start: float, end: float, sampling_rate: int | None = None) -> np.ndarray:
        """Show where in a span of a recording the model looks: see [`attention_map`].

        What is longer than a window is looked at in equal pieces of at most one. Where the preparation repeats a piece
        up to the length of the model's input, the attention to its repetitions is averaged.

        Args:
            source: as in a call.
            start: of the span, in s.
            end: of the span, in s.
            sampling_rate: as in a call.

        Returns:
            Shape (frequency patches, time patches), lowest frequencies and earliest time first; the columns share the
            span's time equally.

        Raises:
            ValueError: if the encoder is no AST, or the span is not within the recording; and as a call.
            FileNotFoundError: if there is no such file.
        """
        target = self.feature_extractor.sampling_rate
        found: list[tuple[int, np.ndarray]] = []
        gain = gain_to(self.level, source, sampling_rate)
        with open_audio(source, sampling_rate) as (rate, blocks):
            for _ in tap_sections(blocks, sections_of([(start, end)], rate), found):
                pass
        if not found:
            raise ValueError(f"The span from {start} s starts after the recording's end.")
        waveform = gain * resample(found[0][1], rate, target)
        pieces = np.array_split(waveform, max(1, math.ceil(len(waveform) / (self.window * target))))
        with self._attention:
            maps = [attention_map(self.model, self.feature_extractor, piece).T for piece in pieces]
        return np.concatenate(
            [self._folded(each, len(piece)) for each, piece in zip(maps, pieces, strict=True)], axis=1
        )

    def _folded(self, attention: np.ndarray, num_samples: int) -> np.ndarray:
        """Cut (frequencies, times) to the times of `num_samples` of audio; of their repetitions, take the mean."""
        extractor, encoder = self.feature_extractor, self.model.config.audio_config
        frames = extractor.filterbank.num_frames(extractor.clip_lengths[int(extractor.bucket(num_samples))])
        period = min(num_samples / extractor.filterbank.hop_length, frames)
        columns = max(1, round(period / encoder.time_stride))
        repetitions = max(1, int(frames // period)) if extractor.padding == "cyclic" else 1
        before = (frames - period) / 2 if extractor.padding == "zero_centered" else 0.0
        within = (np.arange(columns) + 0.5) / columns * period
        times = before + within + period * np.arange(repetitions)[:, None]
        centres = np.arange(attention.shape[1]) * encoder.time_stride + encoder.patch_size / 2
        return np.stack([np.interp(times, centres, row).mean(axis=0) for row in attention])


def _too_late(number: int, of: int) -> str:
    return f"{number} of {of} cycles start after the recording's end."


def average_steps(edges: np.ndarray, probabilities: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """Average steps over the time that each cycle shares with them.

    Args:
        edges: of the steps, (steps, 2), in s.
        probabilities: of each class in each step, (steps, classes).
        cycles: start and end of each, (cycles, 2), in s, ends within the recording.

    Returns:
        Shape (cycles, classes).

    Raises:
        ValueError: if a cycle starts after the recording's end.
    """
    start = np.maximum(cycles[:, :1], edges[:, 0])
    shared = (np.minimum(cycles[:, 1:], edges[:, 1]) - start).clip(0)
    total = shared.sum(axis=1, keepdims=True)
    if late := int((total == 0).sum()):
        raise ValueError(_too_late(late, len(cycles)))
    return shared @ probabilities / total


def sections_of(cycles: Sequence[tuple[float, float]], rate: int) -> list[tuple[int, int]]:
    """Turn times in s into samples, truncated as where cycles are cut for training.

    Raises:
        ValueError: if there are none, or one does not go from a time to a later one, or is shorter than `SHORTEST_S`.
    """
    if len(cycles) == 0:
        raise ValueError("There are no cycles: leave them out, and windows are scored.")
    sections = []
    for start, end in cycles:
        if not (0 <= start < end < math.inf and end - start >= SHORTEST_S):
            raise ValueError(f"From {start} to {end} s there is nothing to hear: give a start and a later end, in s.")
        sections.append((int(start * rate), int(end * rate)))
    return sections


class _Ear:
    """Listens to a recording as it passes: its length, whether there is sound, and the quality of each part."""

    def __init__(self, feature_extractor: QLungFeatureExtractor):
        self.feature_extractor = feature_extractor
        self.parts: list[QualityPart] = []
        self.seconds = 0.0
        self.lowest, self.highest = math.inf, -math.inf

    def listen(self, blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
        """Resample consecutive blocks, measure them part by part, and pass the parts on."""
        extractor, heard = self.feature_extractor, 0
        resampled = resample_blocks(self._follow(blocks), rate, extractor.sampling_rate)
        for part in consecutive_parts(resampled, round(PART_S * extractor.sampling_rate)):
            start, heard = heard, heard + len(part)
            self.seconds = heard / extractor.sampling_rate
            quality = extractor.quality(part) if extractor.quality_score == "learned" else None
            reasons = extractor.quality_reasons(part)
            self.parts.append(QualityPart(start / extractor.sampling_rate, self.seconds, quality, reasons))
            yield part

    def _follow(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Keep the extremes as they were recorded: a resampler rings where a constant begins."""
        for block in blocks:
            self.lowest, self.highest = min(self.lowest, block.min()), max(self.highest, block.max())
            yield block

    @property
    def silent(self) -> bool:
        return self.highest - self.lowest < SILENT_RANGE

    @property
    def quality(self) -> float | None:
        """Mean over the parts, weighted by their length; `entropy_rms`, which does not measure it, gives None."""
        if self.feature_extractor.quality_score != "learned":
            return None
        lengths = [part.end - part.start for part in self.parts]
        return float(np.average([part.quality for part in self.parts], weights=lengths))

    @property
    def reasons(self) -> list[str]:
        return [reason for reason, _ in Counter(reason for part in self.parts for reason in part.reasons).most_common()]
