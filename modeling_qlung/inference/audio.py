"""The one way from a sound file to a waveform at the model's rate."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr


def read_audio(source: str | Path | bytes | BinaryIO, sampling_rate: int = 16000) -> np.ndarray:
    """Read a recording as one channel at the given rate.

    Args:
        source: a path, an open binary file, or the bytes of one; any format that libsndfile reads.
        sampling_rate: in Hz.

    Returns:
        Float32 samples in [-1, 1], shape (samples,); channels are averaged.

    Raises:
        ValueError: if the file is not audio, or holds no sample.
        FileNotFoundError: if there is no such file.
    """
    name = source if isinstance(source, (str, Path)) else getattr(source, "name", "the given audio bytes")
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no recording {source}.")
    try:
        waveform, rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} cannot be read as audio ({error}); give a WAV, FLAC, OGG or MP3 file.") from error
    if len(waveform) == 0:
        raise ValueError(f"{name} holds no sample.")
    if waveform.ndim == 2:
        waveform = waveform.mean(axis=1)
    return resample(waveform, rate, sampling_rate)


def resample(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Resample float32 samples (n,) from `rate` to `target_rate` Hz with soxr's high-quality filter."""
    if rate == target_rate:
        return waveform
    return soxr.resample(waveform, rate, target_rate, quality="HQ")
