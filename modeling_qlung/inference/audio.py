"""The one way from a sound file to a waveform at the model's rate, whole or block by block."""

import io
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

AudioFile = str | Path | bytes | BinaryIO
AudioSource = AudioFile | np.ndarray

BLOCK = 1 << 16  # samples of each channel that are read at a time
LOWEST_RATE, HIGHEST_RATE = 1000, 768_000  # Hz; beyond lie broken headers, and 1 Hz would become 16,000 times as much
MOST_CHANNELS = 32
RESAMPLING_QUALITY = "HQ"

# What phones and browsers record and libsndfile does not read. No playlist is among them: one could name other files.
FFMPEG_FORMATS = "aac,amr,asf,matroska,mov"
FFMPEG_CPU_SECONDS = 300  # hours of audio
_AU = struct.Struct(">4s5I")  # Sun's .au: its header stands in a pipe as in a file


def read_audio(source: AudioFile, sampling_rate: int = 16000) -> np.ndarray:
    """Read a recording as one channel at the given rate.

    Args:
        source: a path, an open binary file, or the bytes of one; see [`open_audio`].
        sampling_rate: in Hz.

    Returns:
        Float32 samples in [-1, 1], shape (samples,); channels are averaged.

    Raises:
        ValueError: if the file is not audio, or holds no sample, or NaN.
        FileNotFoundError: if there is no such file.
    """
    with open_audio(source) as (rate, blocks):
        waveform = np.concatenate(list(blocks))
    return resample(waveform, rate, sampling_rate)


def resample(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Resample float32 samples (n,) from `rate` to `target_rate` Hz with soxr's high-quality filter."""
    if rate == target_rate:
        return waveform
    return soxr.resample(waveform, rate, target_rate, quality=RESAMPLING_QUALITY)


def resample_blocks(blocks: Iterable[np.ndarray], rate: int, target_rate: int) -> Iterator[np.ndarray]:
    """Resample consecutive blocks of a waveform: together, bit for bit what [`resample`] gives for the whole."""
    if rate == target_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, target_rate, 1, dtype="float32", quality=RESAMPLING_QUALITY)
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, dtype=np.float32), last=True)


@contextmanager
def open_audio(source: AudioSource, sampling_rate: int | None = None) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Open a recording to be read once, block by block, in memory that does not grow with its length.

    Args:
        source: a path, an open binary file or the bytes of one: a format that libsndfile reads (WAV, FLAC, OGG, MP3,
            ...), or, where the program ffmpeg is installed, M4A, AAC, WebM, WMA or AMR. Or samples of shape (samples,)
            or (samples, channels): float in [-1, 1], or integers of their type's whole range.
        sampling_rate: of samples, in Hz; a file names its own.

    Yields:
        The recording's own rate in Hz, and its blocks: float32, shape (samples,), channels averaged.

    Raises:
        ValueError: if the source is not audio, its rate is missing or out of range, or, once the blocks are read, it
            holds no sample, NaN or infinite ones, or breaks off.
        FileNotFoundError: if there is no such file.
    """
    name = str(source) if isinstance(source, (str, Path)) else getattr(source, "name", "the given audio")
    if isinstance(source, (str, Path, bytes)) or hasattr(source, "read"):
        if sampling_rate is not None:
            raise ValueError(f"{name} names its own sampling rate: leave sampling_rate out.")
        opened: AbstractContextManager[tuple[int, Iterator[np.ndarray]]] = _open_file(source, name)
    elif sampling_rate is None:
        raise ValueError("The samples come without their rate: give sampling_rate, in Hz.")
    else:
        opened = nullcontext((sampling_rate, _split(np.asarray(source))))
    with opened as (rate, blocks):
        if not LOWEST_RATE <= rate <= HIGHEST_RATE or rate != int(rate):
            raise ValueError(f"The sampling rate is {rate} Hz; it must be whole, {LOWEST_RATE} to {HIGHEST_RATE} Hz.")
        yield int(rate), _mono(blocks, name)


def measure_level(source: AudioSource, sampling_rate: int | None = None) -> float:
    """Measure a recording's RMS amplitude about its mean, block by block; an open file is left where it was.

    Args:
        source: as for [`open_audio`], which tells what is raised.
        sampling_rate: as there.
    """
    file = source if isinstance(source, io.IOBase) else None
    start = file.tell() if file else 0
    number, total, squares = 0, 0.0, 0.0
    with open_audio(source, sampling_rate) as (_, blocks):
        for block in blocks:
            number += len(block)
            total += float(block.sum(dtype=np.float64))
            squares += float(np.square(block, dtype=np.float64).sum())
    if file:
        file.seek(start)
    return max(squares / number - (total / number) ** 2, 0.0) ** 0.5


def gain_to(level: float | None, source: AudioSource, sampling_rate: int | None = None) -> np.float32:
    """Give the factor that brings a recording to an RMS amplitude, 1 for no such level and for one without any sound.

    Args:
        level: RMS amplitude.
        source: as for [`measure_level`].
        sampling_rate: as there.
    """
    own = measure_level(source, sampling_rate) if level else 0.0
    return np.float32(level / own if level and own else 1.0)


def _split(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Cut samples into float32 blocks of shape (samples, channels)."""
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= MOST_CHANNELS):
        raise ValueError(f"The samples have shape {samples.shape}: give (samples,) or (samples, channels).")
    if not (np.issubdtype(samples.dtype, np.floating) or np.issubdtype(samples.dtype, np.integer)):
        raise ValueError(f"The samples are {samples.dtype}: give floating-point numbers in [-1, 1], or integers.")
    return (_as_float(samples[start : start + BLOCK]) for start in range(0, len(samples), BLOCK))


def _as_float(block: np.ndarray) -> np.ndarray:
    block = block.reshape(len(block), -1)
    if np.issubdtype(block.dtype, np.floating):
        return block.astype(np.float32)
    limits = np.iinfo(block.dtype)
    half = 2.0 ** (limits.bits - 1)
    return ((block.astype(np.float64) - (half if limits.min == 0 else 0)) / half).astype(np.float32)


def _mono(blocks: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    """Average the channels of blocks (samples, channels), and see to it that there are samples, all of them finite."""
    total = 0
    for block in blocks:
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise ValueError(f"{name} holds NaN or infinite samples: repair or drop the recording.")
        total += len(mono)
        yield mono
    if not total:
        raise ValueError(f"{name} holds no sample.")


@contextmanager
def _open_file(source: Any, name: str) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Open a file: its rate, and its blocks of shape (samples, channels)."""
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no recording {name}.")
    opened = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        file = soundfile.SoundFile(opened)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: the file's name ends in .raw
        file, reason = None, error
    if file is not None:
        with file:
            yield file.samplerate, _blocks_of(file, name)
        return
    program = shutil.which("ffmpeg")
    if program is None:
        raise ValueError(
            f"{name} cannot be read as audio ({reason}); give a WAV, FLAC, OGG or MP3 file, or install ffmpeg, with "
            "which M4A, AAC and WebM are read."
        )
    with _local_file(opened) as path, _open_with_ffmpeg(program, path, name) as decoded:
        yield decoded


def _blocks_of(file: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    try:
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            yield block
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} cannot be read as audio to its end ({error}): it is damaged.") from error


@contextmanager
def _local_file(source: str | Path | BinaryIO) -> Iterator[Path]:
    """Give the path of a file, of a copy for the time being where it is just open: M4A is not read front to back."""
    if isinstance(source, (str, Path)):
        yield Path(source).resolve()
        return
    with tempfile.NamedTemporaryFile() as copy:
        source.seek(0)
        shutil.copyfileobj(source, copy)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def _open_with_ffmpeg(program: str, path: Path, name: str) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Decode a local file's first audio stream in another process, which waits while its blocks are not read."""
    allowed = ["-protocol_whitelist", "file,pipe", "-format_whitelist", FFMPEG_FORMATS]
    command = [program, "-nostdin", "-v", "error", "-timelimit", str(FFMPEG_CPU_SECONDS), *allowed]
    command += ["-i", f"file:{path}", "-vn", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    # The log is a file: a pipe that nobody reads would fill, and stop the decoder.
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stderr=log, **streams) as process:
        assert process.stdout is not None
        decoded = process.stdout

        def failure() -> ValueError:
            code = process.wait()
            log.seek(0)
            lines = log.read().decode(errors="replace").replace(f"file:{path}: ", "").splitlines()
            reason = re.sub(r"^\[.*?\] ", "", lines[0]) if lines else f"it ended with {code}"  # "[mov @ 0x55d]"
            told = {"whitelist": ": it is of no such format, or damaged", "matches no streams": ": it holds no sound"}
            reason = next((said for sign, said in told.items() if sign in reason), f" (ffmpeg: {reason})")
            return ValueError(f"{name} cannot be read as audio{reason}; give a WAV, FLAC, OGG, MP3 or M4A file.")

        def blocks(channels: int) -> Iterator[np.ndarray]:
            while data := decoded.read(4 * channels * BLOCK):
                yield np.frombuffer(data, dtype=">f4").astype(np.float32).reshape(-1, channels)
            if process.wait():
                raise failure()

        try:
            header = decoded.read(_AU.size)
            if len(header) < _AU.size:
                raise failure()
            _, offset, _, _, rate, channels = _AU.unpack(header)
            decoded.read(offset - _AU.size)
            yield rate, blocks(channels)
        finally:
            process.kill()  # nobody may have read to the end
