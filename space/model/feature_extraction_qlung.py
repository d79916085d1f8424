"""Feature extractor of QLung: waveforms of any length to normalised log-mel filterbanks of one length, or of a few."""

import math

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import logging

from .filterbank_qlung import FRONT_ENDS, ClapFilterbank, KaldiFilterbank
from .quality_parameters_qlung import QUALITY_PARAMETERS
from .quality_qlung import (
    NORMALIZATIONS,
    QUALITY_SCORES,
    entropy_and_rms,
    learned_quality,
    quality_levels,
    quality_reasons,
    quality_score,
)

logger = logging.get_logger(__name__)

PADDINGS = ("cyclic", "zero", "zero_centered")


class QLungFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns respiratory cycles of any length into the input of a QLung model: cut or pad to `duration`, or to the smallest
    of `durations` that holds the cycle, log-mel filterbank of the encoder's front end, `(x - mean) / (2 * std)`.

    A waveform longer than `duration` is cut. A shorter one is repeated (`padding="cyclic"`) or put into silence
    (`"zero"`, `"zero_centered"`), and the last `fade_out` seconds of the padded clip fade linearly to zero, as in the
    Patch-Mix preparation (Bae et al. 2023); the cycle's own start is faded only if `fade_in` asks for it.

    Args:
        feature_size (`int`, *optional*): number of mel bands. Defaults to the front end's (128; 64 for CLAP).
        sampling_rate (`int`, *optional*):
            Rate of the waveforms, in Hz. Defaults to the front end's (16000; 48000 for CLAP, which takes no other).
        padding_value (`float`, *optional*, defaults to 0.0):
            What follows an item's own frames in a batch of several `durations`; a clip's own padding is `padding`.
        front_end (`str`, *optional*, defaults to `"kaldi"`):
            `"kaldi"` for an AST, `"clap"` for CLAP's audio tower: see [`KaldiFilterbank`] and [`ClapFilterbank`].
        duration (`float`, *optional*, defaults to 8.0):
            Length of the padded clip, in seconds. CLAP was trained on 10 s (1,001 frames), takes up to 10.23 s, and
            stretches what is shorter in time to its grid of 1,024 frames.
        durations (`list[float]`, *optional*):
            Lengths of the padded clip, in seconds, ascending, the last one `duration`: each waveform gets the smallest
            that holds it, so that an AST pays for no more than that. Its configuration names them, in frames, as
            `input_frames`. Not for CLAP, which stretches all to one grid.
        num_frames (`int`, *optional*):
            Number of frames given out. Defaults to what `duration` holds (798 for 8 s; 801 for CLAP). Kaldi's front end
            makes further frames zero before normalisation, as in SAM-AST's 1024; in CLAP's decibels zero is loud, and
            they are refused.
        padding (`str`, *optional*, defaults to `"cyclic"`):
            `"cyclic"`, `"zero"`, or `"zero_centered"`: as much silence before the waveform as after it.
        fade_in (`float`, *optional*, defaults to 0.0): linear fade at the clip's start, in seconds.
        fade_out (`float`, *optional*, defaults to 0.0625): linear fade at a padded clip's end, in seconds.
        mean (`float`, *optional*):
            Subtracted from the log-mel values. Defaults to the front end's (AudioSet's -4.2677393; 0 for CLAP).
        std (`float`, *optional*): half of what they are then divided by. Defaults to 4.5689974; 0.5 for CLAP.
        quality_score (`str`, *optional*, defaults to `"entropy_rms"`):
            `"entropy_rms"`, QLung's published score, or `"learned"`, the probability that a clinician would call the
            recording usable: see `quality_qlung`.
        quality_parameters (`dict`, *optional*):
            Of the learned score; defaults to the package's. Kept with the checkpoint.
        quality_normalization (`str`, *optional*, defaults to `"raw"`):
            How spectral entropy and RMS are normalised in the quality score: `raw`, `minmax`, `percentile`, `zscore`.
        quality_statistics (`dict`, *optional*): what `fit_statistics` of `quality_qlung` gave on the training set.
    """

    model_input_names = ["input_values"]  # noqa: RUF012 - Transformers' own class attribute

    def __init__(
        self,
        feature_size: int | None = None,
        sampling_rate: int | None = None,
        padding_value: float = 0.0,
        front_end: str = "kaldi",
        duration: float = 8.0,
        durations: list[float] | None = None,
        num_frames: int | None = None,
        padding: str = "cyclic",
        fade_in: float = 0.0,
        fade_out: float = 0.0625,
        mean: float | None = None,
        std: float | None = None,
        quality_score: str = "entropy_rms",
        quality_parameters: dict | None = None,
        quality_normalization: str = "raw",
        quality_statistics: dict[str, list[float]] | None = None,
        **kwargs,
    ):
        if front_end not in FRONT_ENDS:
            raise ValueError(f"front_end is {front_end!r}; choose one of {', '.join(FRONT_ENDS)}.")
        default = FRONT_ENDS[front_end]
        kwargs["return_attention_mask"] = False
        super().__init__(
            feature_size=feature_size or default.num_mel_bins,
            sampling_rate=sampling_rate or default.sampling_rate,
            padding_value=padding_value,
            **kwargs,
        )
        mean, std = (default.mean if mean is None else mean), (default.std if std is None else std)
        self.front_end = front_end
        self.duration = duration
        self.durations = durations
        self._validate_durations(num_frames)
        frame_length = self.filterbank.frame_length
        if padding not in PADDINGS:
            raise ValueError(f"padding is {padding!r}; choose one of {', '.join(PADDINGS)}.")
        shortest = (durations or [duration])[0]
        if self.clip_lengths[0] < frame_length:
            frame = frame_length / self.sampling_rate
            raise ValueError(f"duration is {shortest} s; it must hold one frame of {frame:.4g} s.")
        if min(fade_in, fade_out) < 0 or max(fade_in, fade_out) > shortest:
            raise ValueError(f"fade_in is {fade_in} and fade_out {fade_out} s; both must be within [0, {shortest}].")
        if std <= 0:
            raise ValueError(f"std is {std}; it must be positive.")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; it must be positive.")
        held = self.filterbank.num_frames(self.num_samples)
        if front_end == "clap" and num_frames is not None and num_frames > held:
            raise ValueError(f"num_frames is {num_frames}, and {duration} s hold {held}: CLAP's input is not padded.")
        if quality_score not in QUALITY_SCORES:
            raise ValueError(f"quality_score is {quality_score!r}; choose one of {', '.join(QUALITY_SCORES)}.")
        if quality_normalization not in NORMALIZATIONS:
            raise ValueError(
                f"quality_normalization is {quality_normalization!r}; choose one of {', '.join(NORMALIZATIONS)}."
            )
        self.num_frames = num_frames
        self.padding = padding
        self.fade_in = fade_in
        self.fade_out = fade_out
        self.mean = mean
        self.std = std
        self.quality_score = quality_score
        if quality_score == "learned" and quality_parameters is None:
            quality_parameters = QUALITY_PARAMETERS
        self.quality_parameters = quality_parameters
        self.quality_normalization = quality_normalization
        self.quality_statistics = quality_statistics

    def _validate_durations(self, num_frames: int | None) -> None:
        if self.durations is None:
            return
        if self.front_end == "clap":
            raise ValueError("CLAP stretches all input to one grid, a shorter one costs as much: leave durations out.")
        if num_frames is not None:
            raise ValueError(f"num_frames is {num_frames}, but durations give each clip its own: leave one out.")
        ascending = self.durations == sorted(set(self.durations))
        if len(self.durations) < 2 or not ascending or self.durations[-1] != self.duration:
            raise ValueError(
                f"durations are {self.durations}; give two or more in ascending order, the last one the duration of "
                f"{self.duration} s."
            )

    @property
    def filterbank(self) -> KaldiFilterbank | ClapFilterbank:
        """The front end, at this rate and number of bands."""
        return FRONT_ENDS[self.front_end](self.sampling_rate, self.feature_size)

    @property
    def clip_lengths(self) -> list[int]:
        """Lengths that a padded clip may have, in samples, ascending."""
        return [round(duration * self.sampling_rate) for duration in self.durations or [self.duration]]

    @property
    def num_samples(self) -> int:
        """Length of the longest padded clip, in samples."""
        return self.clip_lengths[-1]

    @property
    def input_frames(self) -> list[int]:
        """Numbers of frames that may be given out, ascending."""
        return [self.num_frames or self.filterbank.num_frames(length) for length in self.clip_lengths]

    @property
    def max_length(self) -> int:
        """Largest number of frames given out."""
        return self.input_frames[-1]

    def bucket(self, num_samples: int | np.ndarray) -> np.ndarray:
        """Give the index in `clip_lengths` of what waveforms of so many samples become, in the shape given."""
        return np.searchsorted(self.clip_lengths[:-1], num_samples)  # what is longer than all is cut to the last

    def __call__(
        self,
        raw_speech,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        return_quality: bool = False,
        device: str | torch.device = "cpu",
        **kwargs,
    ) -> BatchFeature:
        """Prepare one waveform or a batch of them for the model.

        Args:
            raw_speech (`np.ndarray`, `torch.Tensor`, `list[float]`, or a list of these):
                Mono waveforms of shape (samples,), float, in [-1, 1], at `self.sampling_rate`.
            sampling_rate (`int`, *optional*): rate of `raw_speech`; pass it, so that a wrong one is an error.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; by default a list of arrays.
            return_quality (`bool`, *optional*, defaults to `False`): add `quality`, one score in [0, 1] per waveform as
                given, whatever of it the clip holds.
            device (`str`, *optional*, defaults to `"cpu"`): where the filterbank is computed; with
                `return_tensors="pt"` the values stay there.

        Returns:
            `BatchFeature`: `input_values` of shape (batch, `max_length`, `feature_size`), and `quality` (batch,) if
            asked for. With several `durations`: as many frames as the longest of the batch, `padding_value` after each
            item's own (in a list of arrays, its own alone), and `num_frames` (batch,), which tells them to the model.
            An item's values do not depend on the others.

        Raises:
            ValueError: for another sampling rate, more than one channel, integer samples, and empty, NaN or infinite
                waveforms.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"Pass sampling_rate to {type(self).__name__}: it expects {self.sampling_rate} Hz and cannot tell."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The waveform's rate is {sampling_rate} Hz and the model's {self.sampling_rate} Hz: resample it, for "
                "example with soxr.resample(waveform, rate, model_rate)."
            )
        waveforms = [self._validated(waveform, index) for index, waveform in enumerate(_as_batch(raw_speech))]
        clips = [self.fit_length(waveform) for waveform in waveforms]
        if self.durations is None:
            features = self.extract_features(torch.stack(clips).to(device))
            data: dict = {"input_values": features if return_tensors == "pt" else list(features.cpu().numpy())}
        else:
            num_samples = torch.tensor([clip.numel() for clip in clips])
            padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).to(device)
            features, num_frames = self.extract_mixed_features(padded, num_samples)
            values = features if return_tensors == "pt" else list(features.cpu().numpy())
            if return_tensors is None:
                values = [value[:frames] for value, frames in zip(values, num_frames.tolist(), strict=True)]
            data = {"input_values": values, "num_frames": num_frames.numpy()}
        if return_quality:
            data["quality"] = np.array([self.quality(waveform) for waveform in waveforms], dtype=np.float32)
        return BatchFeature(data, tensor_type=return_tensors)

    def quality(self, waveform: torch.Tensor | np.ndarray) -> float:
        """Give the quality score in [0, 1] of one waveform as recorded, shape (samples,), at `self.sampling_rate`."""
        waveform = self._validated(waveform)
        if self.quality_score == "learned":
            levels = quality_levels(waveform, self.sampling_rate)
            return learned_quality(levels, self.quality_parameters or {})
        entropy, rms = entropy_and_rms(waveform, self.sampling_rate)
        return quality_score(entropy, rms, self.quality_normalization, self.quality_statistics)

    def quality_reasons(self, waveform: torch.Tensor | np.ndarray) -> list[str]:
        """Say what may be wrong with one waveform as recorded, shape (samples,): "clipped", "mains hum", ..."""
        return quality_reasons(self._validated(waveform), self.sampling_rate)

    def _validated(self, waveform, index: int = 0) -> torch.Tensor:
        if isinstance(waveform, (str, bytes)) or waveform is None:
            raise ValueError(f"Waveform {index} is {waveform!r:.60}: read the file first, and give its samples.")
        if not torch.is_tensor(waveform):
            waveform = np.asarray(waveform)
            if waveform.dtype.kind not in "biuf":
                raise ValueError(f"Waveform {index} holds {waveform.dtype}: give its samples as numbers.")
            # Backwards, read-only or in another byte order, torch does not take it.
            waveform = torch.from_numpy(np.require(waveform, waveform.dtype.newbyteorder("="), ["C", "W"]))
        if waveform.ndim != 1:
            raise ValueError(
                f"Waveform {index} has shape {tuple(waveform.shape)}: give mono waveforms of shape (samples,), a batch "
                "as a list of them; average the channels of stereo first."
            )
        if waveform.numel() == 0:
            raise ValueError(f"Waveform {index} is empty: it must hold at least one sample.")
        if not waveform.is_floating_point():
            raise ValueError(
                f"Waveform {index} holds {waveform.dtype}: convert integer samples to float in [-1, 1] first."
            )
        waveform = waveform.to(torch.float32)
        # A NaN is both the smallest and the largest; asking of every sample takes eight times as long.
        if not torch.isfinite(torch.stack(waveform.aminmax())).all():
            raise ValueError(f"Waveform {index} holds NaN or infinite samples: repair or drop the recording.")
        return waveform

    def fit_length(self, waveform: torch.Tensor, num_samples: int | None = None) -> torch.Tensor:
        """Cut or pad a waveform (samples,) and fade it: the first half of the preparation.

        Args:
            waveform: shape (samples,), float32.
            num_samples: one of `clip_lengths`; the smallest that holds the waveform if None.
        """
        length = waveform.numel()
        target = num_samples or self.clip_lengths[int(self.bucket(length))]
        if length >= target:
            clip = waveform[:target]
        elif self.padding == "cyclic":
            clip = waveform.repeat(math.ceil(target / length))[:target]
        else:
            before = (target - length) // 2 if self.padding == "zero_centered" else 0
            clip = torch.nn.functional.pad(waveform, (before, target - length - before))
        fade_in = round(self.fade_in * self.sampling_rate)
        fade_out = round(self.fade_out * self.sampling_rate) if length < target else 0
        if fade_in and length >= target:
            clip = clip.clone()  # a cut is still part of what was given
        if fade_in:
            clip[:fade_in] *= torch.linspace(0, 1, fade_in, device=clip.device)
        if fade_out:
            clip[-fade_out:] *= torch.linspace(1, 0, fade_out, device=clip.device)
        return clip

    def extract_features(self, clips: torch.Tensor) -> torch.Tensor:
        """Make normalised log-mel features of clips, on their device: the second half of the preparation.

        Args:
            clips: shape (batch, samples), float32, each from [`fit_length`], all of one of `clip_lengths`.

        Returns:
            Shape (batch, frames, `feature_size`).
        """
        # On a CPU one clip at a time stays in the cache, and is four times faster than a batch.
        chunks = clips.split(1) if clips.device.type == "cpu" else (clips,)
        features = torch.cat([self.filterbank(chunk) for chunk in chunks])
        if self.num_frames is not None:
            features = features[:, : self.num_frames]
            features = torch.nn.functional.pad(features, (0, 0, 0, self.num_frames - features.shape[1]))
        return (features - self.mean) / (2 * self.std)

    def extract_mixed_features(
        self, clips: torch.Tensor, num_samples: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make features of clips of several lengths, those of one length together.

        Args:
            clips: shape (batch, samples of the longest), float32, each from [`fit_length`] and padded at its end.
            num_samples: length of each clip, (batch,), of `clip_lengths`.

        Returns:
            Shape (batch, frames of the longest, `feature_size`), `padding_value` after each item's frames, and the
            number of each item's frames, (batch,).
        """
        num_frames = torch.tensor([self.filterbank.num_frames(length) for length in num_samples.tolist()])
        features = clips.new_full((len(clips), int(num_frames.max()), self.feature_size), self.padding_value)
        for length in num_samples.unique().tolist():
            rows = num_samples == length
            group = self.extract_features(clips[rows, :length])
            features[rows, : group.shape[1]] = group
        return features, num_frames


def _as_batch(raw_speech) -> list:
    """Make a list of waveforms from one waveform or a list of them."""
    if isinstance(raw_speech, (np.ndarray, torch.Tensor)) or np.isscalar(raw_speech) or raw_speech is None:
        return [raw_speech]
    if len(raw_speech) == 0:
        raise ValueError("The waveform is empty: it must hold at least one sample.")
    return [raw_speech] if np.isscalar(raw_speech[0]) else list(raw_speech)


QLungFeatureExtractor.register_for_auto_class()
