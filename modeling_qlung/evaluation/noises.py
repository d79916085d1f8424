"""What spoils lung-sound recordings, synthesised: noises to add at a given signal-to-noise ratio, clipping, dropouts.

No corpus is needed, and what comes out depends on the random generator alone:

- `white`: Gaussian noise, the recorder's own;
- `ambient`: pink noise (1/f), whose level drifts as a room's does;
- `babble`: four voices of syllables, each a train of glottal pulses through three formants, or a fricative. It has the
  pitch, formants and rhythm of speech, not its words: no speech corpus is at hand;
- `knocks`: two blows per second on the chest piece, damped resonances of 60 to 500 Hz with a click;
- `rumble`: friction of the chest piece, bursts of noise of 15 to 120 Hz;
- `hum`: 50 Hz mains and nine harmonics;
- `crying`: one child's voice, its pitch at 350 to 550 Hz, in cries of a second;
- `clipping`: the loudest samples flattened;
- `dropouts`: packets of 40 ms lost.

To these nine the learned quality score is fitted. Four more are only there to measure it, `UNSEEN`:

- `60 Hz hum`: the mains of other countries;
- `alarm`: a monitor's beeps, in threes, at 400 to 1,000 Hz;
- `cloth`: rustling, short scrapes of 300 to 3,000 Hz;
- `music`: a toy's tune, plucked notes of a scale, from 260 to 1,050 Hz.

Noise is made at 8 kHz, SPRSound's rate, and resampled as its recordings are, and so is what clipping and dropouts do:
else anything above 4 kHz would give it away. The ratio is that of powers over the whole recording, which has noise of
its own. What comes out is as loud as what went in: the kind and amount of noise differ, and not the loudness.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from hf_datasets.simulated import shape

from ..inference import resample

RATE = 16000
_DEVICE_RATE = 8000
_VOICES = 4
_PACKET_S = 0.04

Noise = Callable[[Generator, int], NDArray]


@dataclass(frozen=True)
class Degradation:
    """
    One way to spoil a recording, at eight levels.

    Args:
        unit: of the levels: `dB` of signal-to-noise ratio, or `%` of the samples that are lost.
        levels: from mild to severe.
        prepare: draws the noise for samples (n,) at 16 kHz, and gives what maps each of the levels to samples (n,).
    """

    unit: str
    levels: tuple[float, ...]
    prepare: Callable[[NDArray, Generator], Callable[[float], NDArray]]


def degrade(waveform: NDArray, kind: str, seed: int) -> list[NDArray]:
    """Spoil a recording at every level of one kind of `DEGRADATIONS`, with the same noise throughout.

    Args:
        waveform: samples (n,) at 16 kHz.
        kind: one of `DEGRADATIONS` or `UNSEEN`.
        seed: the same seed gives the same noise.

    Returns:
        Samples (n,), float32, at each level, mildest first.
    """
    kinds = DEGRADATIONS | UNSEEN
    degradation = kinds[kind]
    number = list(kinds).index(kind)  # else two kinds would draw the same noise
    at_level = degradation.prepare(waveform, np.random.default_rng((seed, number)))
    return [at_level(level).astype(np.float32) for level in degradation.levels]


def synthesize(kind: str, samples: int, rng: Generator) -> NDArray:
    """Synthesise one kind of `NOISES` or `UNSEEN_NOISES`: samples (n,) at 16 kHz, without mean, of RMS 1."""
    length = max(1, -(-samples * _DEVICE_RATE // RATE))
    noise = resample((NOISES | UNSEEN_NOISES)[kind](rng, length), _DEVICE_RATE, RATE)
    noise = np.pad(noise, (0, max(0, samples - len(noise))))[:samples]
    noise = noise - noise.mean()
    return noise / max(noise.std(), np.finfo(noise.dtype).tiny)


def add_noise(waveform: NDArray, noise: NDArray, snr_db: float) -> NDArray:
    """Add noise (n,) to samples (n,), their powers (without mean) `snr_db` apart, and keep the recording's RMS."""
    noise = (noise - noise.mean()) * (waveform.std() / max(noise.std(), np.finfo(np.float64).tiny))
    return _as_loud(waveform + noise * 10 ** (-snr_db / 20), waveform)


def spoil_half(waveform: NDArray, kind: str, seed: int) -> list[NDArray]:
    """Add one kind of `NOISES` or `UNSEEN_NOISES` to the second half of a recording alone, at each of `HALF_SNR_DB`.

    Args:
        waveform: samples (n,) at 16 kHz.
        kind: of noise.
        seed: the same seed gives the same noise.

    Returns:
        Samples (n,), float32, at each ratio of the whole recording's power to that of the noise while it lasts, the
        weakest noise first.
    """
    half = len(waveform) // 2
    noise = np.zeros(len(waveform))
    number = list(NOISES | UNSEEN_NOISES).index(kind)
    noise[half:] = waveform.std() * synthesize(kind, len(waveform) - half, np.random.default_rng((seed, number)))
    copies = (waveform + noise * 10 ** (-snr_db / 20) for snr_db in HALF_SNR_DB)
    return [_as_loud(copy, waveform).astype(np.float32) for copy in copies]


def clip(waveform: NDArray, percent: float) -> NDArray:
    """Flatten the loudest samples (`percent` of them) of samples (n,) at 16 kHz, and keep the recording's RMS."""
    sampled = resample(waveform, RATE, _DEVICE_RATE)
    limit = np.quantile(np.abs(sampled), 1 - percent / 100)
    return _as_recorded(np.clip(sampled, -limit, limit), waveform)


def drop(waveform: NDArray, seed: int, percent: float) -> NDArray:
    """Silence packets of 40 ms, `percent` of samples (n,) at 16 kHz, drawn by `seed`, and keep the recording's RMS.

    What is lost at one level is lost at every higher one.
    """
    sampled = resample(waveform, RATE, _DEVICE_RATE).copy()
    packet = np.arange(len(sampled)) // round(_PACKET_S * _DEVICE_RATE)
    order = np.random.default_rng(seed).permutation(packet[-1] + 1)
    sampled[(order < np.ceil(percent / 100 * len(order)))[packet]] = 0
    return _as_recorded(sampled, waveform)


def _as_recorded(sampled: NDArray, waveform: NDArray) -> NDArray:
    """Bring what a device of 8 kHz gives out to 16 kHz, as long and as loud as `waveform`."""
    samples = resample(sampled, _DEVICE_RATE, RATE)
    return _as_loud(np.pad(samples, (0, max(0, len(waveform) - len(samples))))[: len(waveform)], waveform)


def _as_loud(samples: NDArray, waveform: NDArray) -> NDArray:
    return samples * (_rms(waveform) / max(_rms(samples), np.finfo(np.float64).tiny))


def _rms(samples: NDArray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


# ---- Noises: (n,) at 8 kHz, of any level ----


def _white(rng: Generator, length: int) -> NDArray:
    return rng.standard_normal(length)


def _ambient(rng: Generator, length: int) -> NDArray:
    drift = np.exp(0.4 * _drifting(rng, length, 1.0, rng.standard_normal))
    return drift * shape(rng.standard_normal(length), _DEVICE_RATE, 20.0, _DEVICE_RATE / 2, -3.0)


def _rumble(rng: Generator, length: int) -> NDArray:
    bursts = _drifting(rng, length, 0.25, lambda number: rng.gamma(0.7, size=number))
    return (0.1 + bursts) * shape(rng.standard_normal(length), _DEVICE_RATE, 15.0, 120.0, -3.0)


def _hum(rng: Generator, length: int, hertz: int = 50) -> NDArray:
    times = np.arange(length) / _DEVICE_RATE
    harmonics = np.arange(1, 11)
    heights = rng.uniform(0.5, 1.5, len(harmonics)) / harmonics
    phases = rng.uniform(0, 2 * np.pi, len(harmonics))
    waves = [h * np.sin(2 * np.pi * hertz * k * times + p) for k, h, p in zip(harmonics, heights, phases, strict=True)]
    return np.sum(waves, axis=0)


def _knocks(rng: Generator, length: int) -> NDArray:
    noise = np.zeros(length)
    for _ in range(max(1, rng.poisson(2 * length / _DEVICE_RATE))):
        start = int(rng.integers(length))
        times = np.arange(min(round(0.25 * _DEVICE_RATE), length - start)) / _DEVICE_RATE
        blow = rng.standard_normal(len(times)) * np.exp(-times / 0.001)  # the click
        for _ in range(3):
            frequency, decay = np.exp(rng.uniform(np.log(60), np.log(500))), rng.uniform(0.005, 0.04)
            blow += np.exp(-times / decay) * np.sin(2 * np.pi * frequency * times)
        noise[start : start + len(times)] += rng.lognormal(0, 0.5) * blow
    return noise


def _babble(rng: Generator, length: int) -> NDArray:
    noise = np.zeros(length)
    for _ in range(_VOICES):
        pitch = np.exp(rng.uniform(np.log(100), np.log(300)))  # Hz, of men to children
        start = -int(rng.integers(1000))
        while start < length:
            syllable = _syllable(rng, pitch)
            _add_at(start, syllable, noise)
            pause = rng.uniform(0.2, 0.8) if rng.random() < 0.15 else rng.uniform(0, 0.05)
            start += len(syllable) + round(pause * _DEVICE_RATE)
    return noise


def _syllable(rng: Generator, pitch: float) -> NDArray:
    """0.12 to 0.3 s of a vowel, or of a fricative, of RMS 1 before it fades in and out."""
    length = round(rng.uniform(0.12, 0.3) * _DEVICE_RATE)
    size = 4096  # longer than any syllable, and quick to transform
    frequencies = np.fft.rfftfreq(size, 1 / _DEVICE_RATE)
    if rng.random() < 0.2:
        source, response = rng.standard_normal(length), frequencies**2 / (2500.0**2 + frequencies**2)
    else:
        glide = pitch * rng.uniform(0.9, 1.1) * np.linspace(1, rng.uniform(0.8, 1.1), length)
        source = np.diff(np.floor(np.cumsum(glide / _DEVICE_RATE)), prepend=0)  # a pulse at each opening of the glottis
        response = 1 / (1 + frequencies / 300)
        formants = rng.uniform([300, 900, 2300], [900, 2300, 3200])
        response *= np.sum([1 / (1 + ((frequencies - f) / 100) ** 2) for f in formants], axis=0)
    sound = np.fft.irfft(np.fft.rfft(source, size) * response, size)[:length]
    return sound / np.sqrt(np.mean(sound**2)) * np.sin(np.pi * (np.arange(length) + 0.5) / length)


def _crying(rng: Generator, length: int) -> NDArray:
    noise = np.zeros(length)
    pitch = rng.uniform(350, 550)  # Hz
    start = -int(rng.integers(_DEVICE_RATE))
    while start < length:
        cry = round(rng.uniform(0.6, 1.4) * _DEVICE_RATE)
        phase = np.linspace(0, 1, cry)
        rising = pitch * rng.uniform(0.9, 1.1) * (0.85 + 0.3 * np.sin(np.pi * phase))  # up, and down again
        turns = 2 * np.pi * np.cumsum(rising) / _DEVICE_RATE
        heights = rng.uniform(0.3, 1.0, 6) / np.arange(1, 7)  # harmonics, below 4 kHz
        voice = heights @ np.sin(np.arange(1, 7)[:, None] * turns)
        _add_at(start, voice * np.sin(np.pi * phase) ** 0.5, noise)
        start += cry + round(rng.uniform(0.3, 0.8) * _DEVICE_RATE)  # breathes in
    return noise


def _alarm(rng: Generator, length: int) -> NDArray:
    times = np.arange(length) / _DEVICE_RATE + rng.uniform(0, 2)
    frequency = np.exp(rng.uniform(np.log(400), np.log(1000)))
    tone = sum(np.sin(2 * np.pi * frequency * k * times) / k**2 for k in (1, 2, 3))
    beat = times % 2.0  # three beeps in 0.75 s, and silence
    edge = np.clip(np.minimum(beat % 0.25, 0.15 - beat % 0.25) / 0.01, 0, 1)
    return tone * np.where(beat < 0.75, edge, 0)


def _cloth(rng: Generator, length: int) -> NDArray:
    bursts = _drifting(rng, length, 0.08, lambda number: rng.gamma(0.3, size=number))
    return bursts * shape(rng.standard_normal(length), _DEVICE_RATE, 300.0, 3000.0, 0.0)


def _music(rng: Generator, length: int) -> NDArray:
    noise = np.zeros(length)
    beat = rng.uniform(0.2, 0.4)  # seconds
    scale = 261.6 * 2 ** (np.array([0, 2, 4, 5, 7, 9, 11, 12, 14, 16, 17, 19, 21, 23, 24]) / 12)  # Hz, two octaves
    times = np.arange(round(1.5 * _DEVICE_RATE)) / _DEVICE_RATE
    start, note = -int(rng.integers(_DEVICE_RATE)), int(rng.integers(len(scale)))
    while start < length:
        tone = sum(np.sin(2 * np.pi * k * scale[note] * times) * np.exp(-4 * k * times) / k for k in (1, 2, 3))
        _add_at(start, tone * np.minimum(times / 0.005, 1), noise)
        start += round(rng.choice([1, 1, 2]) * beat * _DEVICE_RATE)
        note = int(np.clip(note + rng.integers(-3, 4), 0, len(scale) - 1))
    return noise


def _add_at(start: int, sound: NDArray, noise: NDArray) -> None:
    """Add to noise (n,) what of a sound (m,) lies within it; it starts at a sample that may be before the first."""
    part = sound[max(0, -start) : max(0, len(noise) - start)]
    noise[max(0, start) : max(0, start) + len(part)] += part


def _drifting(rng: Generator, length: int, seconds: float, draw: Callable[[int], NDArray]) -> NDArray:
    """Random values `seconds` apart, joined by lines; they start at a random place between two."""
    step = seconds * _DEVICE_RATE
    values = draw(int(length / step) + 3)
    return np.interp(np.arange(length) / step + rng.random(), np.arange(len(values)), values)


NOISES: dict[str, Noise] = {
    "white": _white,
    "ambient": _ambient,
    "babble": _babble,
    "knocks": _knocks,
    "rumble": _rumble,
    "hum": _hum,
    "crying": _crying,
}
UNSEEN_NOISES: dict[str, Noise] = {
    "60 Hz hum": partial(_hum, hertz=60),
    "alarm": _alarm,
    "cloth": _cloth,
    "music": _music,
}
SNR_DB = (30.0, 25.0, 20.0, 15.0, 10.0, 5.0, 0.0, -5.0)
HALF_SNR_DB = (10.0, 0.0, -10.0, -20.0, -30.0, -40.0)
_LOST_PERCENT = (0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 40.0, 50.0)


def _noisy(kind: str) -> Degradation:
    def prepare(waveform: NDArray, rng: Generator) -> Callable[[float], NDArray]:
        return partial(add_noise, waveform, synthesize(kind, len(waveform), rng))

    return Degradation("dB", SNR_DB, prepare)


DEGRADATIONS: dict[str, Degradation] = {
    **{kind: _noisy(kind) for kind in NOISES},
    "clipping": Degradation("%", _LOST_PERCENT, lambda waveform, rng: partial(clip, waveform)),
    "dropouts": Degradation(
        "%", _LOST_PERCENT, lambda waveform, rng: partial(drop, waveform, int(rng.integers(2**32)))
    ),
}
UNSEEN: dict[str, Degradation] = {kind: _noisy(kind) for kind in UNSEEN_NOISES}
