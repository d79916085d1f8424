"""Recording quality from the waveform alone: QLung's audio quality score (arXiv 2606.11915, section 2).

AQS = clip(1 - alpha * H + beta * R, 0, 1): H is the normalised spectral entropy, high for noise-like sound, and R the
normalised RMS energy, low for weak sound. The paper does not say on which signal H and R are measured nor how they are
normalised. Here both are measured on the waveform as recorded, before fading and padding, and within a band that every
recording has whatever its rate was or is (16 kHz for AST, 48 kHz for CLAP: the same score); statistics fitted on the
training set spread them over [0, 1].
"""

import functools
import math

import numpy as np
import torch

NORMALIZATIONS = ("raw", "minmax", "percentile", "zscore")
# A 4 kHz recording, resampled to 16 kHz, is empty above about 1.8 kHz; below 50 Hz are handling and mains.
BAND_HZ = (50.0, 1800.0)
FRAME_LENGTH_S = 0.032


@functools.lru_cache(maxsize=8)
def _hann_window(length: int, device: torch.device) -> torch.Tensor:
    return torch.hann_window(length, device=device)


def entropy_and_rms(waveform: torch.Tensor | np.ndarray, sampling_rate: int = 16000) -> tuple[float, float]:
    """Measure spectral entropy and RMS amplitude between 50 and 1800 Hz.

    Args:
        waveform: samples in [-1, 1], shape (n,), as recorded: neither faded nor padded.
        sampling_rate: of `waveform`, in Hz; at least 3600.

    Returns:
        The mean over frames (32 ms, half overlapped) of the Shannon entropy of the power spectrum divided by that of
        a flat one, in [0, 1]; and the RMS amplitude. A silent waveform has entropy 1 and RMS 0.

    Raises:
        ValueError: if the waveform is empty or its rate does not hold the band.
    """
    waveform = torch.as_tensor(waveform, dtype=torch.float32)
    if waveform.ndim != 1 or waveform.numel() == 0:
        raise ValueError(f"Quality needs a waveform of shape (n,) with n > 0, got {tuple(waveform.shape)}.")
    if sampling_rate < 2 * BAND_HZ[1]:
        raise ValueError(f"Quality needs a sampling rate of at least {2 * BAND_HZ[1]:.0f} Hz, got {sampling_rate}.")
    length = round(FRAME_LENGTH_S * sampling_rate)  # so bins are 31.25 Hz wide at any rate, and the band has as many
    waveform = torch.nn.functional.pad(waveform, (0, max(0, length - waveform.numel())))
    window = _hann_window(length, waveform.device)
    spectrum = torch.stft(waveform, length, length // 2, window=window, center=False, return_complex=True)
    low, high = (round(edge * length / sampling_rate) for edge in BAND_HZ)
    power = spectrum[low : high + 1].abs().square()  # (bins, frames)
    energy = power.sum(dim=0)
    share = power / energy.clamp_min(torch.finfo(power.dtype).tiny)
    entropy = torch.special.entr(share).sum(dim=0) / math.log(power.shape[0])
    entropy = torch.where(energy > 0, entropy, 1.0)
    # Parseval: one-sided bins carry half of the energy of the windowed frame.
    mean_square = 2 * energy.mean() / (length * window.square().sum())
    return float(entropy.mean().clamp(0, 1)), float(mean_square.sqrt())


def fit_statistics(measurements: np.ndarray, normalization: str) -> dict[str, list[float]]:
    """Fit the statistics that normalise entropy and RMS on a training set.

    Args:
        measurements: rows of (entropy, rms) as given by [`entropy_and_rms`], shape (recordings, 2).
        normalization: `raw` (no statistics), `minmax` (smallest, largest), `percentile` (5th, 95th) or `zscore`
            (mean, standard deviation).

    Returns:
        `{"entropy": [a, b], "rms": [a, b]}`, empty for `raw`.

    Raises:
        ValueError: for an unknown normalisation, or where the training set has no spread.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; choose one of {', '.join(NORMALIZATIONS)}.")
    if normalization == "raw":
        return {}
    measurements = np.asarray(measurements, dtype=np.float64)
    if normalization == "zscore":
        pairs = np.stack([measurements.mean(axis=0), measurements.std(axis=0)])
        spread = pairs[1]
    else:
        pairs = np.percentile(measurements, [0, 100] if normalization == "minmax" else [5, 95], axis=0)
        spread = pairs[1] - pairs[0]
    if not (spread > 0).all():
        raise ValueError(f"Entropy and RMS do not vary over these {len(measurements)} recordings: nothing to fit.")
    return {name: pairs[:, column].tolist() for column, name in enumerate(("entropy", "rms"))}


def _normalize(value: float, pair: list[float], normalization: str) -> float:
    first, second = pair
    if normalization == "zscore":  # through the normal distribution function, which maps it into (0, 1)
        return 0.5 * (1 + math.erf((value - first) / (second * math.sqrt(2))))
    return min(max((value - first) / (second - first), 0.0), 1.0)


def quality_score(
    entropy: float,
    rms: float,
    normalization: str = "raw",
    statistics: dict[str, list[float]] | None = None,
    alpha: float = 0.7,
    beta: float = 0.3,
) -> float:
    """Give QLung's audio quality score: clip(1 - alpha * H + beta * R, 0, 1).

    Args:
        entropy: normalised spectral entropy, in [0, 1].
        rms: RMS amplitude.
        normalization: how `entropy` and `rms` become H and R, see [`fit_statistics`].
        statistics: what [`fit_statistics`] gave for it.
        alpha: weight of the entropy.
        beta: weight of the energy.

    Raises:
        ValueError: if `statistics` are missing for a normalisation that needs them.
    """
    if normalization != "raw":
        if not statistics:
            raise ValueError(f"Quality normalisation {normalization!r} needs statistics: fit them with fit_statistics.")
        entropy = _normalize(entropy, statistics["entropy"], normalization)
        rms = _normalize(rms, statistics["rms"], normalization)
    return min(max(1 - alpha * entropy + beta * rms, 0.0), 1.0)
