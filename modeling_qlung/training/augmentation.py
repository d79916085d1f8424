"""Random changes of training examples: masks on features, gain and noise on waveforms.

All draws are made on the CPU, from torch's global generator or from one that is given, so a seed means the same change
on every device. Draw inside the training step, or give a generator: a data loader fetches batches ahead of their step,
and after resuming would draw other changes there, and shift the global generator for dropout too.

What is drawn goes to the device by [`send`]: nothing here waits for a GPU.
"""

from dataclasses import dataclass
from typing import Literal

import torch


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy values from the CPU to a device, on a GPU without waiting for it.

    From pageable memory a copy waits for all the work that the GPU was given before, so that a step could not be
    prepared during the last one.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class SpecAugment:
    """Frequency and time masks (Park et al. 2019, arXiv 1904.08779), drawn for each item on its own.

    A mask's width is floor(U(0, width)), as in torchaudio and in Patch-Mix (Bae et al. 2023), whose numbers and widths
    are the defaults; its start is uniform over all places where the mask fits. (`torchaudio`'s own masks never reach
    the last bin or frame, take no generator and no fill per item.) What Patch-Mix's code does beyond that is
    `as_published.spec_augment`.

    Args:
        freq_masks: Number of frequency masks per item.
        freq_width: Upper bound of their width in mel bins, never reached; limited to the number of bins.
        time_masks: Number of time masks per item.
        time_width: Upper bound of their width in frames, never reached; limited to the number of frames.
        full_frames: Number of frames that `time_width` is meant for: in features of fewer, time masks are narrower in
            proportion, and hide as large a share of a clip. None: as wide in any.
        fill: Value under the masks. "mean" is the item's own mean over all frames and bins before masking; "mean per
            axis" takes it again after the frequency masks, for the time masks.
        probability: How often an item is masked at all.
    """

    freq_masks: int = 2
    freq_width: int = 48
    time_masks: int = 2
    time_width: int = 160
    full_frames: int | None = None
    fill: Literal["mean", "mean per axis"] | float = "mean"
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("freq_masks", "freq_width", "time_masks", "time_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if isinstance(self.fill, str) and self.fill not in ("mean", "mean per axis"):
            raise ValueError(f'fill must be "mean", "mean per axis" or a number, got {self.fill!r}.')
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {self.probability}.")

    def __call__(self, features: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Masks a batch of features.

        Args:
            features: (batch, frames, mel). Not changed.
            generator: A CPU generator; torch's global one by default.

        Returns:
            (batch, frames, mel), a new tensor.

        Raises:
            ValueError: If `features` is not three-dimensional.
        """
        if features.ndim != 3:
            raise ValueError(f"features must be (batch, frames, mel), got shape {tuple(features.shape)}.")
        batch, frames, mel = features.shape
        bins = _draw_masks(batch, mel, self.freq_masks, self.freq_width, generator)
        time_width = self.time_width * frames // (self.full_frames or frames)
        times = _draw_masks(batch, frames, self.time_masks, time_width, generator)
        if self.probability < 1:  # otherwise nothing is drawn, so that a seed means the same masks as ever
            applied = torch.rand(batch, 1, generator=generator) < self.probability
            bins, times = bins & applied, times & applied
        bins, times = send(bins, features.device)[:, None, :], send(times, features.device)[:, :, None]
        if self.fill != "mean per axis":
            return torch.where(times | bins, self._fill(features), features)
        features = torch.where(bins, self._fill(features), features)
        return torch.where(times, self._fill(features), features)

    def _fill(self, features: torch.Tensor) -> torch.Tensor | float:
        """Value under the masks, one for all items or one for each."""
        return features.mean(dim=(1, 2), keepdim=True) if isinstance(self.fill, str) else self.fill


def _draw_masks(batch: int, size: int, masks: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """Union of each item's masks along one axis, (batch, size), bool."""
    positions = torch.arange(size)
    union = torch.zeros(batch, size, dtype=torch.bool)
    for _ in range(masks):
        widths = (torch.rand(batch, 1, generator=generator) * min(width, size)).long()
        starts = (torch.rand(batch, 1, generator=generator) * (size - widths + 1)).long()
        union |= (positions >= starts) & (positions < starts + widths)
    return union


@dataclass(frozen=True)
class WaveformAugment:
    """Random gain and white noise (SAM-AST: Isik et al. 2025, arXiv 2512.22564).

    Args:
        gain: Range of the uniformly drawn factor.
        gain_probability: How often a gain is applied.
        noise_std: Standard deviation of the noise, full scale being 1.
        noise_probability: How often noise is added, after the gain.
    """

    gain: tuple[float, float] = (0.9, 1.1)
    gain_probability: float = 0.5
    noise_std: float = 1e-4
    noise_probability: float = 0.5

    def __call__(self, clips: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Augments a batch of clips, each on its own.

        Args:
            clips: (batch, samples), floating point. Not changed.
            generator: A CPU generator; torch's global one by default.

        Returns:
            (batch, samples), a new tensor.

        Raises:
            ValueError: If `clips` is not two-dimensional or holds integers.
        """
        if clips.ndim != 2 or not clips.is_floating_point():
            raise ValueError(
                f"clips must be (batch, samples) and floating point, got {clips.dtype} of shape {tuple(clips.shape)}. "
                "Take one channel, and divide integers by full scale."
            )
        batch, samples = clips.shape
        factors = torch.ones(batch, 1, dtype=clips.dtype)
        noise = torch.zeros(batch, samples, dtype=clips.dtype, pin_memory=clips.is_cuda)
        low, high = self.gain
        for factor, added in zip(factors, noise, strict=True):
            apply_gain, apply_noise, position = torch.rand(3, generator=generator).tolist()
            if apply_gain < self.gain_probability:
                factor.fill_(low + (high - low) * position)
            if apply_noise < self.noise_probability:
                added.normal_(std=self.noise_std, generator=generator)
        return (clips * send(factors, clips.device)).add_(send(noise, clips.device))
