"""WAV files as bytes: read, cut by sample, write. No sample value is ever changed, whatever the bit depth.

Cutting works on the bytes of the `data` chunk: nothing is decoded, at 16, 24 or 32 bits. What is written has a plain
44-byte header: SPRSound's malformed `fmt ` chunks (block align 4 for 16-bit mono) come out right, and browsers play the
result.
"""

import logging
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

_PCM, _FLOAT, _EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_RIFF = struct.Struct("<4sI4s")
_CHUNK = struct.Struct("<4sI")
_FMT = struct.Struct("<HHIIHH")


@dataclass(frozen=True)
class Wav:
    """Uncompressed audio: `data` holds interleaved little-endian frames, `rate` is in Hz, `bits` per sample."""

    rate: int
    channels: int
    bits: int
    data: bytes
    encoding: int = _PCM

    @property
    def frame_size(self) -> int:
        """Bytes per frame (one sample of every channel)."""
        return self.channels * self.bits // 8

    @property
    def frames(self) -> int:
        """Number of samples per channel."""
        return len(self.data) // self.frame_size

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.rate

    def cut(self, start: float, end: float) -> "Wav":
        """The samples from `start` to `end`, in seconds.

        Times become samples as in the code of RespireNet (Gairola et al. 2021) and Patch-Mix CL (Bae et al. 2023), on
        whose cycles the published scores rest: truncated, and the end limited to the recording's.

        Raises:
            ValueError: no sample lies between the two times.
        """
        first, last = int(start * self.rate), min(int(end * self.rate), self.frames)
        if not 0 <= first < last:
            raise ValueError(f"no sample between {start} s and {end} s of a recording of {self.duration:.3f} s")
        return replace(self, data=self.data[first * self.frame_size : last * self.frame_size])

    def to_bytes(self) -> bytes:
        """The bytes of a WAV file with a `fmt ` and a `data` chunk and nothing else."""
        byte_rate = self.rate * self.frame_size
        fmt = _FMT.pack(self.encoding, self.channels, self.rate, byte_rate, self.frame_size, self.bits)
        size = len(self.data)
        padding = b"\0" * (size % 2)  # chunks start at even offsets; odd sizes occur at 24 bit
        chunks = _CHUNK.pack(b"fmt ", len(fmt)) + fmt + _CHUNK.pack(b"data", size) + self.data + padding
        return _RIFF.pack(b"RIFF", 4 + len(chunks), b"WAVE") + chunks

    @classmethod
    def from_float(cls, samples: np.ndarray, rate: int, bits: int) -> "Wav":
        """Quantise mono samples (n,), full scale ±1, to 16 or 24 bit PCM; louder samples are clipped."""
        scale = 2 ** (bits - 1)
        integers = np.clip(np.rint(samples * scale), -scale, scale - 1).astype("<i4")
        return cls(rate, 1, bits, integers.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes())


def read_wav(path: Path) -> Wav:
    """Read an uncompressed WAV file (PCM or float, plain or extensible header) without decoding it.

    The `fmt ` chunk's block align is not believed: it is computed from the channels and bits.

    Raises:
        ValueError: the file is not a WAV file, is compressed, or lacks its `fmt ` or `data` chunk.
    """
    content = path.read_bytes()
    if len(content) < _RIFF.size or content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{path} is not a WAV file (it begins with {content[:12]!r}): download it again")
    chunks = _chunks(content)
    if b"fmt " not in chunks or b"data" not in chunks or chunks[b"fmt "][1] < _FMT.size:
        found = ", ".join(repr(name) for name in chunks) or "none"
        raise ValueError(f"{path} lacks a whole fmt or data chunk (found: {found}): download it again")

    offset, size = chunks[b"fmt "]
    encoding, channels, rate, _, _, bits = _FMT.unpack_from(content, offset)
    if encoding == _EXTENSIBLE and size >= 26:
        encoding = struct.unpack_from("<H", content, offset + 24)[0]  # the sub-format's first two bytes
    if encoding not in (_PCM, _FLOAT) or bits not in (8, 16, 24, 32, 64) or not channels or not rate:
        raise ValueError(
            f"{path}: encoding {encoding} with {bits} bits and {channels} channels at {rate} Hz is not uncompressed "
            "audio: convert it to a PCM WAV file"
        )

    offset, size = chunks[b"data"]
    if offset + size > len(content):
        logger.warning("%s is cut short: its header promises %d bytes more", path, offset + size - len(content))
    data = content[offset : offset + size]
    whole = len(data) // (channels * bits // 8) * (channels * bits // 8)
    return Wav(rate, channels, bits, data[:whole], encoding)


def _chunks(content: bytes) -> dict[bytes, tuple[int, int]]:
    """(offset, size) of the body of each chunk, the first of its name."""
    found: dict[bytes, tuple[int, int]] = {}
    position = _RIFF.size
    while position + _CHUNK.size <= len(content):
        name, size = _CHUNK.unpack_from(content, position)
        found.setdefault(name, (position + _CHUNK.size, size))
        position += _CHUNK.size + size + size % 2
    return found
