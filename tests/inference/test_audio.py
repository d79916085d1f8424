"""Reading block by block: what comes out is what other readers give, and what cannot be read is told in a sentence."""

import io
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
import soundfile
import soxr

from modeling_qlung.inference import audio, open_audio, read_audio, resample_blocks

RNG = np.random.default_rng(0)
STEREO = (0.1 * RNG.standard_normal((44100, 2))).clip(-1, 1).astype(np.float32)


def whole(source, sampling_rate=None) -> np.ndarray:
    with open_audio(source, sampling_rate) as (_, blocks):
        return np.concatenate(list(blocks))


@pytest.fixture(scope="module")
def ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("there is no ffmpeg: M4A is not tested")
    return program


def encode(ffmpeg: str, path, samples: np.ndarray, rate: int, *options: str):
    """Write samples through ffmpeg in the format of the path's ending."""
    wav = io.BytesIO()
    soundfile.write(wav, samples, rate, format="WAV", subtype="PCM_16")
    command = [ffmpeg, "-v", "error", "-y", "-i", "pipe:0", *options, f"file:{path}"]
    subprocess.run(command, input=wav.getvalue(), check=True)
    return path


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files are written."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("block", [997, audio.BLOCK])
@pytest.mark.parametrize(
    ("ending", "subtype"),
    [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("flac", "PCM_24"), ("ogg", "VORBIS"), ("mp3", None)],
)
def test_blocks_are_the_file_channels_averaged(tmp_path, monkeypatch, ending, subtype, block):
    monkeypatch.setattr(audio, "BLOCK", block)
    path = tmp_path / f"recording.{ending}"
    soundfile.write(path, STEREO, 44100, subtype=subtype)
    expected, rate = soundfile.read(path, dtype="float64")
    expected = expected.mean(axis=1)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), file):
            with open_audio(source) as (found_rate, blocks):
                found = list(blocks)
            assert found_rate == rate == 44100
            assert max(map(len, found)) <= block
            np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("rate", [4000, 8000, 10000, 22050, 44100, 48000, 96000, 16000])
def test_resampled_blocks_are_soxrs_one_shot_bit_for_bit(tmp_path, rate):
    samples = STEREO[: rate // 2, 0]
    expected = samples if rate == 16000 else soxr.resample(samples, rate, 16000, quality="HQ")
    for size in (1, 331, 5000, len(samples)):
        if size == 1 and rate > 4000:
            continue  # slow
        blocks = [samples[start : start + size] for start in range(0, len(samples), size)]
        assert np.array_equal(np.concatenate(list(resample_blocks(blocks, rate, 16000))), expected)
    soundfile.write(tmp_path / "recording.wav", samples, rate, subtype="FLOAT")
    assert np.array_equal(read_audio(tmp_path / "recording.wav"), expected)


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint8"])
def test_integers_are_shares_of_their_range(tmp_path, dtype):
    subtype = {"int16": "PCM_16", "int32": "PCM_32", "uint8": "PCM_U8"}[dtype]
    soundfile.write(tmp_path / "recording.wav", STEREO, 8000, subtype=subtype)
    read, _ = soundfile.read(tmp_path / "recording.wav", dtype="int16" if dtype == "uint8" else dtype)
    samples = (read // 256 + 128).astype(np.uint8) if dtype == "uint8" else read
    np.testing.assert_allclose(whole(samples, 8000), whole(tmp_path / "recording.wav"), atol=1e-7, rtol=0)


def test_float64_and_lists_and_one_channel_are_samples_too():
    expected = STEREO[:, 0]
    for samples in (expected.astype(np.float64), expected.tolist(), expected[:, None]):
        assert np.array_equal(whole(samples, 4000), expected)


@pytest.mark.parametrize(("ending", "codec"), [("m4a", "alac"), ("mka", "flac")])
def test_what_libsndfile_does_not_read_goes_through_ffmpeg(ffmpeg, tmp_path, scratch, ending, codec):
    """Lossless codecs: every sample comes back, however the file is given, and nothing stays behind."""
    path = encode(ffmpeg, tmp_path / f"-a b:c.{ending}", STEREO, 44100, "-c:a", codec)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.read(path)
    expected = (np.round(STEREO.astype(np.float64) * 32768) / 32768).mean(axis=1)
    with path.open("rb") as file:
        for source in (path, path.read_bytes(), file):
            found = whole(source)
            assert len(found) == len(expected)
            np.testing.assert_allclose(found, expected, atol=2 / 32768, rtol=0)  # as encoders round
    assert not list(scratch.iterdir())


def test_a_phones_m4a(ffmpeg, tmp_path):
    times = np.arange(3 * 48000) / 48000
    tone = 0.5 * np.sin(2 * np.pi * 300 * times)
    path = encode(ffmpeg, tmp_path / "a.m4a", np.stack([tone, 0 * tone], axis=1), 48000, "-c:a", "aac", "-b:a", "128k")
    found = read_audio(path, 16000)
    assert len(found) == pytest.approx(48000, abs=2048)
    middle = found[16000:32000]
    spectrum = np.abs(np.fft.rfft(middle)) / 8000
    assert spectrum.argmax() == 300
    assert spectrum.max() == pytest.approx(0.25, abs=0.01)  # half of the left channel's


def test_a_decoder_that_is_left_ends(ffmpeg, tmp_path, monkeypatch):
    path = encode(ffmpeg, tmp_path / "long.m4a", np.tile(STEREO, (60, 1)), 44100, "-c:a", "alac")
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    with open_audio(path) as (_, blocks):
        next(blocks)
        assert started[0].poll() is None  # it waits for its blocks to be read
    assert started[0].returncode is not None
    assert len(started) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.aac\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile other.aac\n"),
        ("list.m4a", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.aac\n#EXT-X-ENDLIST\n"),
    ],
)
def test_playlists_are_not_followed(ffmpeg, tmp_path, name, text):
    """They would read other files of the machine."""
    encode(ffmpeg, tmp_path / "other.aac", STEREO, 44100)
    assert len(read_audio(tmp_path / "other.aac")) > 15000
    (tmp_path / name).write_text(text)
    played = subprocess.run([ffmpeg, "-v", "error", "-i", tmp_path / name, "-f", "null", "-"], check=False)
    assert played.returncode == 0 or name == "list.m4a", "ffmpeg itself would not play it: the test shows nothing"
    with pytest.raises(ValueError, match="cannot be read as audio"):
        read_audio(tmp_path / name)


def test_without_ffmpeg_the_message_says_what_is_read(ffmpeg, tmp_path, monkeypatch):
    path = encode(ffmpeg, tmp_path / "a.m4a", STEREO, 44100)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"a\.m4a cannot be read as audio .*WAV, FLAC, OGG or MP3.*install ffmpeg"):
        read_audio(path)


def written(samples, rate=8000, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **options})
    return file.getvalue()


NOT_FINITE = np.array([0.1, np.nan, 0.1])
BROKEN = {
    "nothing": (b"", "cannot be read as audio"),
    "text": (b"this is no audio\n" * 100, "cannot be read as audio"),
    "random bytes": (RNG.bytes(100_000), "cannot be read as audio"),
    "half a header": (written(STEREO)[:30], "cannot be read as audio"),
    "a header alone": (written(np.empty(0)), "holds no sample"),
    "not a number": (written(NOT_FINITE, subtype="FLOAT"), "holds NaN"),
    "infinite": (written(np.array([0.1, np.inf]), subtype="FLOAT"), "holds NaN or infinite"),
    "one sample a second": (written(STEREO, rate=1), "sampling rate is 1 Hz"),
    "a million": (written(STEREO, rate=1_000_000), "sampling rate is 1000000 Hz"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_told_in_a_sentence(tmp_path, scratch, case):
    content, message = BROKEN[case]
    path = tmp_path / "file.m4a"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ValueError, match=message) as raised:
            read_audio(source)
        assert "\n" not in str(raised.value)
        assert "@ 0x" not in str(raised.value)
    assert not list(scratch.iterdir())


def test_samples_without_a_header_are_no_audio(tmp_path):
    (tmp_path / "file.raw").write_bytes(written(STEREO)[44:])
    with pytest.raises(ValueError, match=r"file\.raw cannot be read as audio"):
        read_audio(tmp_path / "file.raw")


def test_a_truncated_file_gives_what_is_there_or_a_sentence(ffmpeg, tmp_path):
    content = written(STEREO, rate=44100)
    found = read_audio(content[: len(content) // 2], 44100)
    assert len(found) == pytest.approx(22050, abs=20)
    np.testing.assert_allclose(found, STEREO[: len(found)].mean(axis=1), atol=2 / 32768, rtol=0)
    with pytest.raises(ValueError, match="cannot be read as audio"):
        read_audio(encode(ffmpeg, tmp_path / "whole.m4a", STEREO, 44100).read_bytes()[:5000])
    content = written(STEREO, rate=44100, format="FLAC")
    for cut in (len(content) // 2, len(content) - 7):
        try:
            found = read_audio(content[:cut], 44100)
        except ValueError as error:
            assert "cannot be read as audio" in str(error)  # noqa: PT017 - either is right
        else:
            np.testing.assert_allclose(found, STEREO[: len(found)].mean(axis=1), atol=2 / 32768, rtol=0)


def test_sources_that_are_no_recordings(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recording .*missing\.wav"):
        whole(tmp_path / "missing.wav")
    with pytest.raises(FileNotFoundError, match="no recording"):
        whole(tmp_path)
    with pytest.raises(ValueError, match="give sampling_rate"):
        whole(STEREO)
    with pytest.raises(ValueError, match="leave sampling_rate out"):
        whole(written(STEREO), 8000)
    for rate in (0, -8000, 999, 44100.5, 1e9, float("nan")):
        with pytest.raises(ValueError, match="sampling rate is"):
            whole(STEREO, rate)
    with pytest.raises(ValueError, match=r"shape \(2, 44100\): give \(samples,\) or \(samples, channels\)"):
        whole(STEREO.T, 8000)
    with pytest.raises(ValueError, match="shape"):
        whole(STEREO[None], 8000)
    with pytest.raises(ValueError, match="bool"):
        whole(STEREO > 0, 8000)
    with pytest.raises(ValueError, match="holds no sample"):
        whole(np.empty(0), 8000)
    with pytest.raises(ValueError, match="holds NaN"):
        whole(NOT_FINITE, 8000)
