"""What is brought to the page, good and bad."""

import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile
from recordings import AnnotatedCycle, UnusableInputError, read_cycles, read_recording

from modeling_qlung.inference import read_audio


def test_recording_comes_at_the_models_rate_with_its_own(record):
    path = record(rate=44100, channels=2)
    samples, rate = read_recording(path, 16000)
    assert rate == 44100
    assert samples.dtype == np.int16
    np.testing.assert_allclose(samples / 32768, read_audio(path), atol=2e-5)


def test_formats(record):
    lengths = {len(read_recording(record(f"noise.{kind}"), 16000)[0]) for kind in ("wav", "flac", "ogg")}
    assert lengths == {48000}
    assert abs(len(read_recording(record("noise.mp3"), 16000)[0]) - 48000) < 4000


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed: M4A is not read")
def test_m4a(record, tmp_path):
    subprocess.run(["ffmpeg", "-v", "error", "-i", record(), "-c:a", "aac", tmp_path / "a.m4a"], check=True)
    assert abs(len(read_recording(tmp_path / "a.m4a", 16000)[0]) - 48000) < 4000


@pytest.mark.parametrize(("seconds", "message"), [(0.2985, "lasts 0.298 s"), (601, "longer than 10 minutes")])
def test_length(record, seconds, message):
    with pytest.raises(UnusableInputError, match=message):
        read_recording(record(seconds=seconds, rate=4000), 16000)


def test_the_shortest_and_the_longest_are_read(record):
    for seconds in (0.3, 600):
        assert len(read_recording(record(seconds=seconds, rate=4000), 16000)[0]) == 16000 * seconds


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.wav", b"", "empty.wav is an empty file"),
        ("text.wav", b"not a sound " * 50, "^text.wav cannot be read as audio"),
        ("list.m4a", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "^list.m4a cannot be read as audio"),
        ("header.wav", b"RIFF\x24\x00\x00\x00WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
         + b"data\x00\x00\x00\x00", "^header.wav holds no sample"),
    ],
)  # fmt: skip
def test_what_is_no_recording(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnusableInputError, match=message) as caught:
        read_recording(tmp_path / name, 16000)
    assert str(tmp_path) not in str(caught.value)


def test_nan_and_cut_off_files(tmp_path, record):
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, dtype=np.float32), 8000, subtype="FLOAT")
    with pytest.raises(UnusableInputError, match=r"^nan.wav holds NaN"):
        read_recording(tmp_path / "nan.wav", 16000)
    flac = record("cut.flac")
    flac.write_bytes(flac.read_bytes()[:9000])
    with pytest.raises(UnusableInputError, match=r"^cut.flac cannot be read"):
        read_recording(flac, 16000)


def test_an_upload_that_is_gone(tmp_path):
    for read in (lambda path: read_recording(path, 16000), lambda path: read_cycles(path, 9.0)):
        with pytest.raises(UnusableInputError, match="not kept this long"):
            read(tmp_path / "gone")


def test_annotated_cycles(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff0.036\t0.579\t0\t0\r\n0.579\t2.45\t1\t0\r\n\r\n2.45\t9.2\t1\t1\r\n".encode())
    cycles = read_cycles(file, 9.0)
    assert cycles == [
        AnnotatedCycle(0.036, 0.579, False, False),
        AnnotatedCycle(0.579, 2.45, True, False),
        AnnotatedCycle(2.45, 9.0, True, True),
    ]
    assert [cycle.label for cycle in cycles] == ["normal", "crackle", "both"]


def test_every_real_annotation_file_is_read(real_icbhi):
    files = sorted((real_icbhi / "ICBHI_final_database").glob("*_*_*_*_*.txt"))
    assert len(files) == 920
    assert sum(len(read_cycles(file, 120.0)) for file in files) == 6898


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no cycle"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"0 1 0 0\nstart end\n", "line 2: 'start end' is not a cycle"),
        (b"0 1 0\n", "line 1"),
        (b"0 1 0 2\n", "line 1"),
        (b"1 1 0 0\n", "no length"),
        (b"nan 2 0 0\n", "no length"),
        (b"-1 2 0 0\n", "no length"),
        (b"0 inf 0 0\n", "no length"),
        (b"8 9.6 0 0\n", "beyond the recording, which lasts 9.0 s"),
        (b"9 9.2 0 0\n", "beyond the recording"),
        (b"0 1 0 0\n" * 30000, "too large"),
    ],
)
def test_bad_annotations_are_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UnusableInputError, match=f"a.txt.*{message}"):
        read_cycles(tmp_path / "a.txt", 9.0)
