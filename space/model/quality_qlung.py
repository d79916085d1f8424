"""Recording quality from the waveform alone: QLung's published score, one learned from clinicians, and reasons.

`entropy_rms` is QLung's audio quality score (arXiv 2606.11915, section 2), AQS = clip(1 - alpha * H + beta * R, 0, 1):
H is the normalised spectral entropy, high for noise-like sound, and R the normalised RMS energy, low for weak sound.
The paper does not say on which signal H and R are measured nor how they are normalised. Here both are measured on the
waveform as recorded, before fading and padding, and within a band that every recording has whatever its rate was or is
(16 kHz for AST, 48 kHz for CLAP: the same score); statistics fitted on the training set spread them over [0, 1].

`learned` is the probability that a clinician would call the recording usable: a small convolutional network, fitted on
the 1,949 training recordings of SPRSound (Zhang et al. 2022), and made to fall as noise is added to these and to
simulated recordings, and to refuse loud noise in much of a recording. It reads levels in narrow bands, each relative to
the recording's own in that band, so that neither gain nor sampling rate nor the stethoscope's frequency response
counts, and the recording as a loop, so that hardly anything counts but what is heard: a sound twice over scores as it
does once, but for the seam.
"""

import functools
import math
from typing import Any

import numpy as np
import torch

from .quality_parameters_qlung import REASON_THRESHOLDS

QUALITY_SCORES = ("entropy_rms", "learned")
NORMALIZATIONS = ("raw", "minmax", "percentile", "zscore")
# A 4 kHz recording, resampled to 16 kHz, is empty above about 1.8 kHz; below 50 Hz are handling and mains.
BAND_HZ = (50.0, 1800.0)
FRAME_LENGTH_S = 0.032
LEVEL_BANDS = 24
LEVEL_FRAME_S = 0.032
LEVEL_RANGE_DB = (-25.0, 50.0)  # about the recording's own level in the band
SHORTEST_FRAMES = 62  # 2 s: the last layer sees 68 at once
SHORTEST_S = 2.0  # to find reasons in
REASON_FRAME_S = 0.016


@functools.lru_cache(maxsize=8)
def _hann_window(length: int, device: torch.device) -> torch.Tensor:
    return torch.hann_window(length, device=device)


def _validated(waveform: torch.Tensor | np.ndarray, sampling_rate: int) -> torch.Tensor:
    waveform = torch.as_tensor(waveform, dtype=torch.float32)
    if waveform.ndim != 1 or waveform.numel() == 0:
        raise ValueError(f"Quality needs a waveform of shape (n,) with n > 0, got {tuple(waveform.shape)}.")
    if sampling_rate < 2 * BAND_HZ[1]:
        raise ValueError(f"Quality needs a sampling rate of at least {2 * BAND_HZ[1]:.0f} Hz, got {sampling_rate}.")
    if not waveform.isfinite().all():
        raise ValueError("Quality needs finite samples, got NaN or infinite ones.")
    return waveform


def entropy_and_rms(waveform: torch.Tensor | np.ndarray, sampling_rate: int = 16000) -> tuple[float, float]:
    """Measure spectral entropy and RMS amplitude between 50 and 1800 Hz.

    Args:
        waveform: samples in [-1, 1], shape (n,), as recorded: neither faded nor padded.
        sampling_rate: of `waveform`, in Hz; at least 3600.

    Returns:
        The mean over frames (32 ms, half overlapped) of the Shannon entropy of the power spectrum divided by that of
        a flat one, in [0, 1]; and the RMS amplitude. A silent waveform has entropy 1 and RMS 0.

    Raises:
        ValueError: if the waveform is empty, not finite, or its rate does not hold the band.
    """
    waveform = _validated(waveform, sampling_rate)
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


# ---- The learned score ----


@functools.lru_cache(maxsize=8)
def _band_weights(length: int, sampling_rate: int, device: torch.device) -> torch.Tensor:
    """Triangles (bands, bins) that overlap by half, narrow below 300 Hz and wide above; each row sums to 1."""
    low, high = (math.log1p(edge / 300) for edge in BAND_HZ)
    edges = 300 * torch.expm1(torch.linspace(low, high, LEVEL_BANDS + 2, dtype=torch.float64))
    bins = torch.arange(length // 2 + 1, dtype=torch.float64) * (sampling_rate / length)
    below, centre, above = (edges[start : start + LEVEL_BANDS, None] for start in range(3))
    weights = torch.minimum((bins - below) / (centre - below), (above - bins) / (above - centre)).clamp_min(0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(device, torch.float32)


def band_powers(waveform: torch.Tensor | np.ndarray, sampling_rate: int = 16000) -> torch.Tensor:
    """Measure power in 24 bands from 50 to 1800 Hz, in frames of 64 ms, one each 32 ms.

    Args:
        waveform: samples, shape (n,), as recorded: neither faded nor padded. Less than one frame is repeated.
        sampling_rate: of `waveform`, in Hz; at least 3600.

    Returns:
        Shape (24, frames), relative to the largest sample.

    Raises:
        ValueError: if the waveform is empty, not finite, or its rate does not hold the band.
    """
    waveform = _validated(waveform, sampling_rate)
    waveform = waveform / waveform.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    length = 2 * round(LEVEL_FRAME_S * sampling_rate)
    waveform = waveform.repeat(math.ceil(length / waveform.numel()))
    window = _hann_window(length, waveform.device)
    spectrum = torch.stft(waveform, length, length // 2, window=window, center=False, return_complex=True)
    return _band_weights(length, sampling_rate, waveform.device) @ spectrum.abs().square()


def relative_levels(powers: torch.Tensor) -> torch.Tensor:
    """Give powers (..., 24, frames) as levels relative to each band's own, see [`quality_levels`]."""
    heard = powers > 1e-8 * powers.mean(dim=-1, keepdim=True)
    own = powers.where(heard, torch.nan).nanmedian(dim=-1, keepdim=True).values
    low, high = LEVEL_RANGE_DB
    levels = (10 * torch.log10(powers / own + 10 ** (low / 10))).clamp_max(high).nan_to_num(0.0)
    return torch.cat([levels] * math.ceil(SHORTEST_FRAMES / powers.shape[-1]), dim=-1)


def quality_levels(waveform: torch.Tensor | np.ndarray, sampling_rate: int = 16000) -> torch.Tensor:
    """Measure what the learned score reads: levels in 24 bands from 50 to 1800 Hz, relative to the recording's own.

    Args:
        waveform: samples in [-1, 1], shape (n,), as recorded: neither faded nor padded.
        sampling_rate: of `waveform`, in Hz; at least 3600.

    Returns:
        Decibels, shape (24, frames), a frame each 32 ms, within `LEVEL_RANGE_DB`: 0 is the band's median over all that
        is not digital silence. Zeros for a silent waveform. Frames of what is shorter than 2 s are repeated.

    Raises:
        ValueError: if the waveform is empty, not finite, or its rate does not hold the band.
    """
    return relative_levels(band_powers(waveform, sampling_rate))


def learned_quality(levels: torch.Tensor, parameters: dict[str, Any]) -> float:
    """Give the probability that a clinician would call the recording usable.

    Layers of a circular convolution over 5 frames, a rectifier and, between layers, the larger of each two frames; the
    mean and the deviation over time of what comes out go into a logistic regression.

    Args:
        levels: of one recording, from [`quality_levels`], shape (24, frames).
        parameters: nested lists, as `modeling_qlung.training.quality` fits and writes them.

    Returns:
        In [0, 1]; 0 for silence.

    Raises:
        ValueError: if the parameters are not those of such a network.
    """
    if not levels.any():
        return 0.0

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=levels.device)

    try:
        hidden = levels[None]
        for number, layer in enumerate(parameters["layers"]):
            if number:
                hidden = torch.nn.functional.max_pool1d(hidden, 2)
            weight = tensor(layer["weight"])
            hidden = torch.nn.functional.pad(hidden, 2 * (weight.shape[2] // 2,), mode="circular")
            hidden = torch.relu(torch.nn.functional.conv1d(hidden, weight, tensor(layer["bias"])))
        pooled = torch.cat([hidden.mean(dim=2), hidden.std(dim=2, correction=0)], dim=1)
        logit = pooled[0] @ tensor(parameters["output"]["weight"]) + parameters["output"]["bias"]
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            "quality_parameters are not what modeling_qlung.training.quality writes; leave them out to take the "
            f"package's ({type(error).__name__}: {error})."
        ) from error
    return float(torch.sigmoid(logit))


# ---- Reasons ----


def _decibels(power: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(power + 1e-12)


def _lines(waveform: torch.Tensor, sampling_rate: int, mains_hz: int) -> float:
    """Mean height over their surroundings of the mains' 2nd to 6th harmonics, in dB, 30 at most each.

    The first is among heart sounds. The median over frames of 1 s leaves out what comes and goes, as a wheeze does.
    """
    window = _hann_window(sampling_rate, waveform.device)
    spectrum = torch.stft(waveform, sampling_rate, sampling_rate // 4, window=window, center=False, return_complex=True)
    power = spectrum.abs().square().median(dim=1).values  # bins are 1 Hz wide
    heights = []
    for harmonic in range(2 * mains_hz, 7 * mains_hz, mains_hz):
        around = torch.cat([power[harmonic - 20 : harmonic - 4], power[harmonic + 5 : harmonic + 21]])
        heights.append(_decibels(power[harmonic - 1 : harmonic + 2].max()) - _decibels(around.median()))
    return float(torch.stack(heights).clamp(0, 30).mean())


def _running_median(levels: torch.Tensor, around: int) -> torch.Tensor:
    """Median (frames,) of each of levels (frames,) and of `around` frames on either side."""
    padded = torch.nn.functional.pad(levels[None], (around, around), mode="reflect")[0]
    return padded.unfold(0, 2 * around + 1, 1).median(dim=1).values


def _impulses_per_s(levels: torch.Tensor) -> float:
    """How often levels (frames,) in dB rise 15 dB above the median of the second around them."""
    above = levels > _running_median(levels, 31) + 15
    return float((above[1:] & ~above[:-1]).sum() / (len(levels) * REASON_FRAME_S))


def _syllables(levels: torch.Tensor) -> float:
    """How far levels (frames,) in dB go up and down within 0.4 s, but for impulses of less than 70 ms."""
    steady = _running_median(levels, 4)[None]
    fast = torch.nn.functional.avg_pool1d(steady, 5, 1)[0, 10:-10]
    return float((fast - torch.nn.functional.avg_pool1d(steady, 25, 1)[0]).std(correction=0))


def reason_measurements(waveform: torch.Tensor | np.ndarray, sampling_rate: int = 16000) -> dict[str, float]:
    """Measure, for each reason of [`quality_reasons`], how much speaks for it.

    Args:
        waveform: samples in [-1, 1], shape (n,), as recorded; what is shorter than 2 s is repeated.
        sampling_rate: in Hz; at least 3600.

    Returns:
        - `too quiet`: RMS amplitude below full scale, in dB;
        - `clipped`: share of blocks of 32 ms that are as loud as any and flat: a tenth of the block lies above 0.8 of
          its largest amplitude, and above 0.8 of what a tenth of any block lies above;
        - `dropouts`: share of blocks of 16 ms whose variance lies 40 dB below the median one;
        - `mains hum`: height of the harmonics of 50 or of 60 Hz, in dB;
        - `low-frequency rumble`: energy from 20 to 100 Hz over that from 130 to 800 Hz, where breath is, in dB;
        - `handling noise`: impulses from 1000 to 1800 Hz, per second;
        - `broadband noise`: the level from 1000 to 1800 Hz that is exceeded four fifths of the time, over the median
          level of breath, in dB;
        - `speech or crying`: deviation within 0.4 s of the level from 1000 to 1800 Hz, in dB, as syllables have it;
          what is 25 dB below the median level of breath does not count;
        - `no breathing heard`: the range over time of the level of breath (90th less 10th percentile of means over
          0.5 s), in dB, with a minus sign.

    Raises:
        ValueError: if the waveform is empty, not finite, or its rate does not hold the band.
    """
    waveform = _validated(waveform, sampling_rate)
    waveform = waveform.repeat(math.ceil(SHORTEST_S * sampling_rate / waveform.numel()))
    waveform = waveform - waveform.mean()
    rms = waveform.square().mean().sqrt()
    waveform = waveform / rms.clamp_min(1e-12)
    block = round(REASON_FRAME_S * sampling_rate)
    blocks = _decibels(waveform[: waveform.numel() // block * block].view(-1, block).var(dim=1))
    tenth = waveform[: waveform.numel() // (2 * block) * 2 * block].view(-1, 2 * block).abs().topk(block // 5).values
    largest, level = tenth[:, 0], tenth[:, -1]
    flat = (level > 0.8 * level.max()) & (level > 0.8 * largest)

    length = 4 * block
    window = _hann_window(length, waveform.device)
    spectrum = torch.stft(waveform, length, block, window=window, center=False, return_complex=True).abs().square()

    def band(low: float, high: float) -> torch.Tensor:
        return spectrum[math.ceil(low * length / sampling_rate) : int(high * length / sampling_rate) + 1].sum(dim=0)

    breath, high = _decibels(band(130, 800)), _decibels(band(1000, 1800))
    slow = torch.nn.functional.avg_pool1d(breath[None], 31, 4)[0]
    return {
        "too quiet": -20 * math.log10(max(float(rms), 1e-12)),
        "clipped": float(flat.float().mean()),
        "dropouts": float((blocks < blocks.median() - 40).float().mean()),
        "mains hum": max(_lines(waveform, sampling_rate, mains_hz) for mains_hz in (50, 60)),
        "low-frequency rumble": float(_decibels(band(20, 100).sum()) - _decibels(band(130, 800).sum())),
        "handling noise": _impulses_per_s(high),
        "broadband noise": float(high.quantile(0.2) - breath.median()),
        "speech or crying": _syllables(high.clamp_min(float(breath.median()) - 25)),
        "no breathing heard": float(slow.quantile(0.1) - slow.quantile(0.9)),
    }


def quality_reasons(waveform: torch.Tensor | np.ndarray, sampling_rate: int = 16000) -> list[str]:
    """Say in words what may be wrong with a recording.

    Args:
        waveform: samples in [-1, 1], shape (n,), as recorded.
        sampling_rate: in Hz; at least 3600.

    Returns:
        The names in [`reason_measurements`] of what is above its threshold, which few good recordings are; clearest
        defects first, empty where there is none.

    Raises:
        ValueError: if the waveform is empty, not finite, or its rate does not hold the band.
    """
    measured = reason_measurements(waveform, sampling_rate)
    if measured["too quiet"] > 120:  # silence, but for rounding
        return ["too quiet"]
    return [name for name, value in measured.items() if value > REASON_THRESHOLDS[name]]
