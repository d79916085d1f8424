"""What people bring to the page: recordings within its limits, and ICBHI's annotation files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling_qlung.inference.audio import open_audio, resample_blocks

SHORTEST, LONGEST = 0.3, 600.0  # s
LARGEST_FILE = "160mb"  # 10 minutes of 44.1 kHz, 24 bits, stereo
LARGEST_ANNOTATION = 200_000  # bytes
_OVERSHOOT = 0.5  # s that an annotated cycle may end after its recording, as some of ICBHI's do


class UnusableInputError(ValueError):
    """Something in what was brought, told in a sentence for the person who brought it."""


@dataclass(frozen=True)
class AnnotatedCycle:
    """One line of an ICBHI annotation file: seconds from the recording's start, and what was heard."""

    start: float
    end: float
    crackles: bool
    wheezes: bool

    @property
    def label(self) -> str:
        """The four-class name: normal, crackle, wheeze or both."""
        return {(0, 0): "normal", (1, 0): "crackle", (0, 1): "wheeze", (1, 1): "both"}[self.crackles, self.wheezes]


def read_recording(path: str | Path, sampling_rate: int) -> tuple[np.ndarray, int]:
    """Read a recording at the model's rate.

    Args:
        path: of any audio file that the platform decodes.
        sampling_rate: in Hz.

    Returns:
        Samples, shape (n,), 16-bit integers: half of the memory, for as long as the page is open. And the recording's
        own rate in Hz.

    Raises:
        UnusableInputError: the file is no audio, damaged or empty, or the recording too short or too long.
    """
    path = Path(path)
    try:
        with open_audio(path) as (rate, blocks):
            pieces = [_as_int16(piece) for piece in resample_blocks(_within_limit(blocks, rate), rate, sampling_rate)]
    except UnusableInputError:
        raise
    except (ValueError, FileNotFoundError) as error:
        if path.is_file() and path.stat().st_size == 0:
            raise UnusableInputError(f"{path.name} is an empty file. Record or export it again.") from error
        if not path.is_file():
            raise UnusableInputError("The uploaded recording is not kept this long. Upload it again.") from error
        raise UnusableInputError(str(error).replace(str(path), path.name)) from error
    samples = np.concatenate(pieces)
    if len(samples) < SHORTEST * sampling_rate:
        milliseconds = 1000 * len(samples) // sampling_rate
        raise UnusableInputError(
            f"{path.name} lasts {milliseconds / 1000:.3f} s. At least {SHORTEST} s are needed, better 10 s or more."
        )
    return samples, rate


def _within_limit(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    total = 0
    for block in blocks:
        total += len(block)
        if total > LONGEST * rate:
            raise UnusableInputError(
                f"The recording is longer than {LONGEST / 60:.0f} minutes. Cut out the part that matters."
            )
        yield block


def _as_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def read_cycles(path: str | Path, duration: float) -> list[AnnotatedCycle]:
    """Read an ICBHI annotation file: in each line start and end (s), crackles and wheezes (0 or 1), tabs between.

    Args:
        path: of the text file.
        duration: of its recording, in s; a cycle that ends just after it ends with it.

    Raises:
        UnusableInputError: the file is not of this form, or of another recording; the message names the line.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_ANNOTATION:
            raise UnusableInputError(f"{path.name} is too large for an annotation file.")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UnusableInputError("The uploaded annotation file is not kept this long. Upload it again.") from error
    except UnicodeDecodeError as error:
        raise UnusableInputError(f"{path.name} is not a text file.") from error
    cycles = [
        _read_cycle(line, f"{path.name}, line {number}", duration)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not cycles:
        raise UnusableInputError(f"{path.name} names no cycle.")
    return cycles


def _read_cycle(line: str, place: str, duration: float) -> AnnotatedCycle:
    fields = line.split()
    try:
        start, end = float(fields[0]), float(fields[1])
        crackles, wheezes = ({"0": False, "1": True}[flag] for flag in fields[2:])
    except (ValueError, KeyError, IndexError) as error:
        raise UnusableInputError(
            f"{place}: {line.strip()[:60]!r} is not a cycle. Each line holds start and end in seconds, then 0 or 1 for "
            "crackles and for wheezes, with tabs between."
        ) from error
    if not 0 <= start < end < float("inf"):
        raise UnusableInputError(f"{place}: the cycle from {start} to {end} s has no length.")
    if start >= duration or end > duration + _OVERSHOOT:
        raise UnusableInputError(
            f"{place}: the cycle from {start} to {end} s lies beyond the recording, which lasts {duration:.1f} s. "
            "Is the file of another recording?"
        )
    return AnnotatedCycle(start, min(end, duration), crackles, wheezes)
