import io
import logging
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from hf_datasets.audio import Wav, read_wav


def noise(path: Path, subtype: str, channels: int = 1, rate: int = 10000, container: str = "WAV") -> Path:
    samples = np.random.default_rng(0).integers(-(2**31), 2**31, (1234, channels)).astype(np.int32)
    sf.write(path, samples, rate, subtype, format=container)
    return path


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_cut_keeps_every_bit(tmp_path, subtype, channels):
    path = noise(tmp_path / "a.wav", subtype, channels)
    cut = read_wav(path).cut(0.0101, 0.0603).to_bytes()
    expected, rate = sf.read(path, dtype="int32", start=101, stop=603, always_2d=True)
    actual, actual_rate = sf.read(io.BytesIO(cut), dtype="int32", always_2d=True)
    np.testing.assert_array_equal(actual, expected)
    assert actual_rate == rate
    assert sf.info(io.BytesIO(cut)).subtype == subtype


def test_float_files_stay_float(tmp_path):
    samples = np.linspace(-1.5, 1.5, 100, dtype=np.float32)
    sf.write(tmp_path / "a.wav", samples, 8000, "FLOAT")
    actual, _ = sf.read(io.BytesIO(read_wav(tmp_path / "a.wav").to_bytes()), dtype="float32")
    np.testing.assert_array_equal(actual, samples)


def test_extensible_header_is_read(tmp_path):
    path = noise(tmp_path / "a.wav", "PCM_24", container="WAVEX")
    assert struct.unpack_from("<H", path.read_bytes(), 20)[0] == 0xFFFE
    with wave.open(io.BytesIO(read_wav(path).to_bytes())) as plain:
        assert (plain.getnframes(), plain.getsampwidth(), plain.getframerate()) == (1234, 3, 10000)


def test_times_are_truncated_to_samples_and_the_end_is_limited():
    wav = Wav(4000, 1, 16, bytes(range(200)))  # 100 frames
    assert wav.cut(0.00099, 0.00199).data == bytes(range(6, 14))  # 3.96 and 7.96: samples 3 to 6
    assert wav.cut(0.02, 99.0).data == bytes(range(160, 200))


@pytest.mark.parametrize(("start", "end"), [(0.01, 0.0101), (0.025, 1.0), (0.02, 0.01), (-0.1, 0.01)])
def test_empty_cut_raises(start, end):
    with pytest.raises(ValueError, match=r"no sample between .* of a recording of 0\.025 s"):
        Wav(4000, 1, 16, bytes(200)).cut(start, end)


def test_malformed_block_align_is_repaired(tmp_path):
    path = noise(tmp_path / "a.wav", "PCM_16")
    content = bytearray(path.read_bytes())
    content[32:34] = struct.pack("<H", 4)
    path.write_bytes(content)
    repaired = read_wav(path).to_bytes()
    assert struct.unpack_from("<IHH", repaired, 28) == (20000, 2, 16)  # bytes per second, block align, bits
    np.testing.assert_array_equal(sf.read(io.BytesIO(repaired), dtype="int16")[0], sf.read(path, dtype="int16")[0])


def test_other_chunks_are_skipped_and_odd_sizes_padded(tmp_path):
    fmt = struct.pack("<HHIIHH", 1, 1, 8000, 24000, 3, 24)
    body = b"LIST" + struct.pack("<I", 3) + b"abc\0" + b"fmt " + struct.pack("<I", 16) + fmt
    body += b"data" + struct.pack("<I", 9) + bytes(range(9)) + b"\0"
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body)
    wav = read_wav(tmp_path / "a.wav")
    assert (wav.data, wav.frames) == (bytes(range(9)), 3)
    written = wav.to_bytes()
    assert len(written) == 44 + 10
    assert struct.unpack_from("<I", written, 4)[0] == len(written) - 8


def test_file_that_is_cut_short_warns(tmp_path, caplog):
    path = noise(tmp_path / "a.wav", "PCM_24")
    path.write_bytes(path.read_bytes()[:-101])
    with caplog.at_level(logging.WARNING):
        wav = read_wav(path)
    assert wav.frames == 1200  # 101 bytes are 33 frames and two thirds
    assert "a.wav is cut short: its header promises 101 bytes more" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a WAV file"),
        (b"<!DOCTYPE html><html></html>", "not a WAV file"),
        (b"RIFF\x04\0\0\0WAVE", "lacks a whole fmt or data chunk .found: none"),
        (b"RIFF\x0c\0\0\0WAVEdata\0\0\0\0", "found: b'data'"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    (tmp_path / "broken.wav").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_wav(tmp_path / "broken.wav")
    assert "broken.wav" in str(error.value)


def test_compressed_audio_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.wav: encoding 7 with 8 bits .* convert it"):
        read_wav(noise(tmp_path / "a.wav", "ULAW"))


@pytest.mark.parametrize("bits", [16, 24])
def test_from_float_quantises_and_clips(bits):
    samples = np.array([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 0.3])
    actual, rate = sf.read(io.BytesIO(Wav.from_float(samples, 8000, bits).to_bytes()), dtype="float64")
    assert rate == 8000
    step = 2.0 ** (1 - bits)
    np.testing.assert_allclose(actual, np.clip(samples, -1, 1 - step), atol=step / 2, rtol=0)
