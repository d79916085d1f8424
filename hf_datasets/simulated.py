"""Simulated lung sounds with known content: what is in each cycle, when, on which device, in how much noise.

For trying out a whole training without a download, and for tests that need to know the truth. Each sound is the
textbook form of the real one (Sovijärvi et al. 2000, Eur Respir Rev 10:77), at the sampling rate of its device:

- breath: noise of 100 to 1,000 Hz, inspiration louder and longer than expiration;
- crackles: initial deflection width and two-cycle duration (IDW, 2CD) about 0.7 and 5 ms when fine, 1.5 and 10 ms when
  coarse (American Thoracic Society); fine ones late in inspiration, coarse ones early in it and in expiration;
- wheezes: 250 ms and more at 100 to 1,000 Hz, with harmonics, mostly in expiration;
- four devices that differ in rate, depth, pass band and tilt; added noise, its signal-to-noise ratio (SNR) drawn for
  each recording.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .audio import Wav
from .labels import event_flags
from .recordings import Cycle, Recording

LOCATIONS = ("Tc", "Al", "Ar", "Pl", "Pr", "Ll", "Lr")
CYCLES_PER_RECORDING = 5
# Kinds of the cycles of a patient, drawn without replacement: half of them normal, and every class in two recordings.
_KINDS = (*["Normal"] * 5, "Fine Crackle", "Coarse Crackle", "Wheeze", "Wheeze", "Wheeze+Crackle")
_DEFLECTION_AND_TWO_CYCLES = {"fine": (0.7e-3, 5e-3), "coarse": (1.5e-3, 10e-3)}  # s
_HARMONICS = (1.0, 0.4, 0.15)
_MARGIN = 0.2  # s before the first and after the last cycle
_PEAK = 0.7  # of full scale
_PERSON, _PLAN, _NOISE = 1, 2, 3  # first words of the seeds: numpy takes (1, 2) and (1, 2, 0) for the same one


@dataclass(frozen=True)
class Device:
    """A stethoscope: sampling rate (Hz), bits per sample, pass band (Hz) and tilt of its response (dB per octave)."""

    name: str
    rate: int
    bits: int
    low: float
    high: float
    tilt: float


DEVICES = (
    Device("sim-4k", 4000, 16, 40.0, 1500.0, -2.0),
    Device("sim-8k", 8000, 16, 80.0, 3000.0, 0.0),
    Device("sim-16k", 16000, 24, 20.0, 6000.0, -4.0),
    Device("sim-44k", 44100, 24, 100.0, 15000.0, 2.0),
)


@dataclass(frozen=True)
class Breath:
    """One respiratory cycle; all times in seconds, `start` from the recording's."""

    start: float
    duration: float
    inspiration: float
    kind: str


@dataclass(frozen=True)
class Crackle:
    """IDW and 2CD in seconds; signed `amplitude`, where breath noise at the height of inspiration has RMS 1."""

    start: float
    deflection: float
    two_cycles: float
    amplitude: float

    @property
    def duration(self) -> float:
        """The 2CD: two cycles are all there is."""
        return self.two_cycles

    def wave(self, times: np.ndarray) -> np.ndarray:
        """Samples at `times` (n,), in seconds from the start: (n,).

        Two cycles that widen, sin(4π u^a) with u = t/2CD and a = log ¼ / log(IDW/2CD), under a window that peaks at
        u = ¼: the first zero crossing is at the IDW, the fourth at the 2CD. After the model of Kiyokawa et al. 2001
        (Chest 119:1886).
        """
        u = np.clip(times / self.two_cycles, 0, 1)
        exponent = np.log(0.25) / np.log(self.deflection / self.two_cycles)
        window = 0.5 * (1 - np.cos(2 * np.pi * np.sqrt(u)))
        return self.amplitude * window * np.sin(4 * np.pi * u**exponent)


@dataclass(frozen=True)
class Wheeze:
    """Seconds and Hz: `frequency` at the start, `glide` more at the end; RMS `amplitude` as for crackles."""

    start: float
    duration: float
    frequency: float
    glide: float
    harmonics: int
    amplitude: float

    def wave(self, times: np.ndarray) -> np.ndarray:
        """Samples at `times` (n,), in seconds from the start: (n,). The tone fades in and out over 30 ms."""
        phase = 2 * np.pi * (self.frequency * times + self.glide * times**2 / (2 * self.duration))
        heights = _HARMONICS[: self.harmonics]
        tone = sum((h * np.sin(k * phase) for k, h in enumerate(heights, start=1)), start=np.zeros(len(times)))
        edges = np.clip(np.minimum(times, self.duration - times) / 0.03, 0, 1)
        rms = np.sqrt(sum(h**2 for h in heights) / 2)
        return self.amplitude / rms * np.sin(np.pi / 2 * edges) ** 2 * tone


@dataclass(frozen=True)
class Plan:
    """All that a recording is made from; `seed` is that of its noises."""

    device: Device
    breaths: tuple[Breath, ...]
    crackles: tuple[Crackle, ...]
    wheezes: tuple[Wheeze, ...]
    snr_db: float
    seed: tuple[int, ...]

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.breaths[-1].start + self.breaths[-1].duration + _MARGIN


def read(seed: int, num_patients: dict[str, int], recordings_per_patient: int) -> dict[str, list[Recording]]:
    """Draw the plans of all recordings: `num_patients` of each split, none of them in two.

    Raises:
        ValueError: a negative seed, or numbers too small for every class to occur in each split.
    """
    if seed < 0 or min(num_patients.values()) < 1 or recordings_per_patient < 2:
        raise ValueError(
            f"seed {seed}, patients {num_patients}, {recordings_per_patient} recordings each: the seed must not be "
            "negative, and every class is in each split only from 1 patient and 2 recordings on"
        )
    return {
        split: [r for patient in range(size) for r in _patient((seed, number, patient), recordings_per_patient)]
        for number, (split, size) in enumerate(num_patients.items())
    }


def synthesize(plan: Plan) -> Wav:
    """The recording as its device stores it."""
    clean, noise = render(plan)
    return Wav.from_float(clean + noise, plan.device.rate, plan.device.bits)


def _patient(seed: tuple[int, int, int], num_recordings: int) -> Iterator[Recording]:
    """The recordings of one patient; `seed` is the dataset's, the split's number and the patient's."""
    rng = np.random.default_rng((_PERSON, *seed))
    _, split, patient = seed
    patient_id = f"S{split * 10_000 + patient:05d}"
    person = {
        "age": float(rng.integers(20, 81)),
        "sex": str(rng.choice(["F", "M"])),
        "bmi": round(rng.uniform(18, 35), 1),
    }
    kinds = [_KINDS[i % len(_KINDS)] for i in range(num_recordings * CYCLES_PER_RECORDING)]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    for index in range(num_recordings):
        device = DEVICES[(patient + index) % len(DEVICES)]
        own_kinds = kinds[index * CYCLES_PER_RECORDING : (index + 1) * CYCLES_PER_RECORDING]
        plan = draw_plan((*seed, index), device, own_kinds)
        location = str(rng.choice(LOCATIONS))
        recording_id = f"{patient_id}_{index}_{location}_sc_{device.name}"
        yield Recording(
            recording_id=recording_id,
            patient_id=patient_id,
            audio=plan,
            cycles=[
                Cycle(b.start, b.start + b.duration, *event_flags(b.kind), source=recording_id, event_type=b.kind)
                for b in plan.breaths
            ],
            metadata={**person, "location": location, "device": device.name, "mode": "sc", "snr_db": plan.snr_db},
        )


def draw_plan(seed: tuple[int, ...], device: Device, kinds: list[str]) -> Plan:
    """Draw a recording with one cycle of each kind (names of `EVENT_TYPES`), in this order."""
    rng = np.random.default_rng((_PLAN, *seed))
    breaths: list[Breath] = []
    crackles: list[Crackle] = []
    wheezes: list[Wheeze] = []
    start = _MARGIN
    for kind in kinds:
        duration = rng.uniform(1.8, 3.6)
        breath = Breath(start, duration, duration * rng.uniform(0.35, 0.45), kind)
        if "Crackle" in kind:
            grain = rng.choice(["fine", "coarse"]) if kind == "Wheeze+Crackle" else kind.split()[0].lower()
            crackles += _draw_crackles(rng, breath, str(grain))
        if "Wheeze" in kind:
            wheezes.append(_draw_wheeze(rng, breath, device.rate))
        breaths.append(breath)
        start += duration
    snr_db = rng.uniform(5, 30)
    return Plan(device, tuple(breaths), tuple(crackles), tuple(wheezes), snr_db, (_NOISE, *seed))


def _draw_crackles(rng: np.random.Generator, breath: Breath, grain: str) -> list[Crackle]:
    deflection, two_cycles = _DEFLECTION_AND_TWO_CYCLES[grain]
    if grain == "fine":
        times = rng.uniform(0.5, 0.98, rng.integers(6, 16)) * breath.inspiration
    else:
        early = rng.uniform(0.1, 0.5, rng.integers(3, 7)) * breath.inspiration
        late = breath.inspiration + rng.uniform(0.05, 0.3, rng.integers(1, 4)) * breath.duration
        times = np.concatenate([early, late])
    crackles = []
    for time in np.sort(times):
        width = rng.uniform(0.85, 1.15)
        amplitude = rng.choice([-1, 1]) * 10 ** (rng.uniform(9, 16) / 20)
        crackles.append(Crackle(breath.start + time, width * deflection, width * two_cycles, amplitude))
    return crackles


def _draw_wheeze(rng: np.random.Generator, breath: Breath, rate: int) -> Wheeze:
    expiration = breath.duration - breath.inspiration
    if rng.random() < 0.8:
        start, duration = breath.inspiration + 0.05 * expiration, rng.uniform(0.25, 0.8 * expiration)
    else:
        start, duration = 0.1 * breath.inspiration, rng.uniform(0.25, 0.8 * breath.inspiration)
    frequency = np.exp(rng.uniform(np.log(150), np.log(700)))
    glide = frequency * rng.uniform(-0.05, 0.05)
    harmonics = min(len(_HARMONICS), int(0.45 * rate / (frequency + abs(glide))))  # below the Nyquist frequency
    return Wheeze(breath.start + start, duration, frequency, glide, harmonics, 10 ** (rng.uniform(0, 8) / 20))


def render(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Synthesise a recording: (sound as the device hears it, added noise), each (samples,), full scale ±1.

    The ratio of their powers over the whole recording is exactly `plan.snr_db`.
    """
    rng, device = np.random.default_rng(plan.seed), plan.device
    times = np.arange(round(plan.duration * device.rate)) / device.rate
    sound = _breath_noise(rng, times, plan)
    events: list[Crackle | Wheeze] = [*plan.crackles, *plan.wheezes]
    for event in events:
        span = slice(*np.searchsorted(times, [event.start, event.start + event.duration]))
        sound[span] += event.wave(times[span] - event.start)
    clean = shape(sound, device.rate, device.low, device.high, device.tilt)

    noise = shape(rng.standard_normal(len(times)), device.rate, 20.0, device.rate / 2, -3.0)  # about pink
    noise *= np.sqrt(np.mean(clean**2) / np.mean(noise**2)) * 10 ** (-plan.snr_db / 20)
    level = _PEAK / np.max(np.abs(clean + noise))
    return level * clean, level * noise


def _breath_noise(rng: np.random.Generator, times: np.ndarray, plan: Plan) -> np.ndarray:
    """Noise of 100 to 1,000 Hz, RMS 1 at the height of inspiration, 0.4 at that of expiration, silent in between."""
    noise = shape(rng.standard_normal(len(times)), plan.device.rate, 100.0, 1000.0, -3.0)
    envelope = np.zeros(len(times))
    for breath in plan.breaths:
        inspired = breath.start + breath.inspiration
        audible_expiration = 0.7 * breath.inspiration
        for start, length, height in ((breath.start, breath.inspiration, 1.0), (inspired, audible_expiration, 0.4)):
            span = slice(*np.searchsorted(times, [start, start + length]))
            envelope[span] = height * np.sin(np.pi * (times[span] - start) / length)
    return envelope * noise / np.sqrt(np.mean(noise**2))


def shape(samples: np.ndarray, rate: float, low: float, high: float, tilt: float) -> np.ndarray:
    """Filter samples (n,) without delay: second-order slopes outside `low` to `high` Hz, `tilt` dB per octave."""
    size = -(-len(samples) // 4096) * 4096  # without large prime factors, which make transforms slow
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 1.0)
    gain = (frequencies / 200) ** (tilt / (20 * np.log10(2)))
    gain /= np.sqrt((1 + (low / frequencies) ** 4) * (1 + (frequencies / high) ** 4))
    return np.fft.irfft(np.fft.rfft(samples, size) * gain, size)[: len(samples)]
