"""Front ends: log-mel filterbanks as AST and CLAP were trained on, batched and on any device.

Each is a small value, made of a sampling rate and a number of mel bands: it holds the geometry of its frames, the
statistics that its values are normalised with by default, and computes the filterbank when called.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank


@dataclass(frozen=True)
class KaldiFilterbank:
    """
    Kaldi's log-mel filterbank, AST's front end (Gong et al. 2021).

    Frames of 25 ms every 10 ms that fit whole into the signal; per frame: mean removed, pre-emphasis 0.97, symmetric
    Hann window, power spectrum, 20 Hz to Nyquist, natural logarithm floored at float32's epsilon. No dither.

    Args:
        sampling_rate: in Hz.
        num_mel_bins: number of mel bands.
    """

    sampling_rate: int = 16000
    num_mel_bins: int = 128
    mean: ClassVar[float] = -4.2677393  # AudioSet's
    std: ClassVar[float] = 4.5689974

    @property
    def frame_length(self) -> int:
        """In samples."""
        return int(0.025 * self.sampling_rate)

    @property
    def hop_length(self) -> int:
        """In samples."""
        return int(0.010 * self.sampling_rate)

    def num_frames(self, num_samples: int) -> int:
        """Count the frames of a signal of that many samples, at least `frame_length` of them."""
        return 1 + (num_samples - self.frame_length) // self.hop_length

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Map waveforms (batch, samples), float32, to log-mel energies (batch, frames, num_mel_bins)."""
        device, fft_length = waveforms.device, 2 ** math.ceil(math.log2(self.frame_length))
        window = _hann_window(self.frame_length, False, torch.float32, device)
        frames = waveforms.unfold(-1, self.frame_length, self.hop_length)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        # The window starts at zero: without its first sample, no frame needs a predecessor from outside of it, and the
        # power spectrum does not change when the frame moves by one.
        frames = torch.sub(frames[..., 1:], frames[..., :-1], alpha=0.97).mul_(window[1:])
        power = _power(torch.fft.rfft(frames, n=fft_length))
        mel = power @ _kaldi_filters(self.num_mel_bins, self.sampling_rate, fft_length, device)
        return mel.clamp_min_(torch.finfo(torch.float32).eps).log_()


@dataclass(frozen=True)
class ClapFilterbank:
    """
    The log-mel filterbank of CLAP without feature fusion (Wu et al. 2023, arXiv 2211.06687).

    Frames of 1,024 samples every 480 at 48 kHz, centred on multiples of the hop, the signal mirrored at its ends;
    periodic Hann window, power spectrum, Slaney's mel filters of unit area from 50 Hz to 14 kHz, decibels floored at
    -100. CLAP itself starts with a batch norm over the bands, so the values are left as they are.

    Args:
        sampling_rate: 48,000 Hz: the frames are CLAP's at no other rate.
        num_mel_bins: number of mel bands.

    Raises:
        ValueError: for another sampling rate.
    """

    sampling_rate: int = 48000
    num_mel_bins: int = 64
    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 0.5
    frame_length: ClassVar[int] = 1024
    hop_length: ClassVar[int] = 480

    def __post_init__(self):
        if self.sampling_rate != 48000:
            raise ValueError(f"sampling_rate is {self.sampling_rate} Hz; CLAP's front end is made for 48000 Hz.")

    def num_frames(self, num_samples: int) -> int:
        """Count the frames of a signal of that many samples, at least `frame_length` of them."""
        return 1 + num_samples // self.hop_length

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Map waveforms (batch, samples), float32, to decibels (batch, frames, num_mel_bins), float32."""
        # Next to a loud low band, float32's rounding fills the weak high ones of a recording that was made at a low
        # rate, up to 0.1 dB; Transformers' own extractor computes in float64 too. Apple's GPUs have none.
        device = waveforms.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        window = _hann_window(self.frame_length, True, dtype, device)
        spectrum = torch.stft(
            waveforms.to(dtype), self.frame_length, self.hop_length, window=window, center=True, return_complex=True
        )
        mel = _power(spectrum).transpose(1, 2) @ _slaney_filters(self.num_mel_bins, dtype, device)
        return mel.clamp_min_(1e-10).log10_().mul_(10).float()


FRONT_ENDS: dict[str, type[KaldiFilterbank] | type[ClapFilterbank]] = {"kaldi": KaldiFilterbank, "clap": ClapFilterbank}


def _power(spectrum: torch.Tensor) -> torch.Tensor:
    return spectrum.real.square().add_(spectrum.imag.square())


@functools.lru_cache(maxsize=16)
def _hann_window(length: int, periodic: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.hann_window(length, periodic=periodic, dtype=dtype, device=device)


@functools.lru_cache(maxsize=16)
def _kaldi_filters(num_mel_bins: int, sampling_rate: int, fft_length: int, device: torch.device) -> torch.Tensor:
    """Kaldi's triangles, equally spaced in mel from 20 Hz to Nyquist: (fft_length / 2 + 1, num_mel_bins)."""

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz, dtype=np.float64) / 700.0)

    edges = np.linspace(mel(20.0), mel(sampling_rate / 2), num_mel_bins + 2)
    bins = mel(np.arange(fft_length // 2 + 1) * sampling_rate / fft_length)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.tensor(np.maximum(0.0, np.minimum(rising, falling)), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=16)
def _slaney_filters(num_mel_bins: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Slaney's triangles of unit area on the bins of CLAP's spectrum: (513, num_mel_bins)."""
    filters = mel_filter_bank(513, num_mel_bins, 50, 14000, 48000, norm="slaney", mel_scale="slaney")
    return torch.tensor(filters, dtype=dtype, device=device)
