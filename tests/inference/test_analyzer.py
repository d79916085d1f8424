"""Whole recordings: against the same steps taken one by one by other means, and what people bring of all kinds."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file
from transformers import ASTConfig, ASTForAudioClassification, pipeline

from hf_datasets.audio import read_wav
from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.inference import LungSoundAnalyzer, attention_map, audio, measure_level
from modeling_qlung.inference import analyzer as analyzer_module

from ..encoders import TINY_AST, TINY_CLAP
from .test_operating_points import CONTENT

ENCODER = {**TINY_AST, "max_length": 198, "time_stride": 16, "frequency_stride": 16, "initializer_range": 0.3}
RNG = np.random.default_rng(0)


def tiny_model(seed: int = 0, **options) -> QLungForAudioClassification:
    """A model of many opinions."""
    torch.manual_seed(seed)
    model = QLungForAudioClassification(QLungConfig(**{"audio_config": ENCODER, "scale": 10.0, **options}))
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def tiny_analyzer(quality_score: str = "learned", **options) -> LungSoundAnalyzer:
    return LungSoundAnalyzer(
        tiny_model(**options), QLungFeatureExtractor(duration=2.0, mean=-8.0, quality_score=quality_score)
    )


def breath(seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise that comes and goes: (samples,) or (samples, channels), float32."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate))[:, None] / rate
    loudness = 0.02 + 0.2 * np.sin(np.pi * times / 1.7) ** 4
    samples = (loudness * rng.standard_normal((len(times), channels))).clip(-0.99, 0.99).astype(np.float32)
    return samples[:, 0] if channels == 1 else samples


def wav(samples: np.ndarray, rate: int, subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


@torch.no_grad()
def probabilities(analyzer: LungSoundAnalyzer, waveform: np.ndarray) -> np.ndarray:
    inputs = analyzer.feature_extractor(waveform, sampling_rate=16000, return_tensors="pt")
    return analyzer.model(**inputs).logits.softmax(-1)[0].double().numpy()


def one_shot(analyzer: LungSoundAnalyzer, waveform: np.ndarray) -> tuple[list, np.ndarray]:
    """Windows of 2 s every 0.5 s of a waveform that is held whole, one after the other, and their means by step."""
    last = max(0, len(waveform) - 32000)
    starts = sorted({*range(0, last + 1, 8000), last})
    scored = {start: probabilities(analyzer, waveform[start : start + 32000]) for start in starts}
    edges = [(start, min(start + 8000, len(waveform))) for start in range(0, len(waveform), 8000)]
    if len(edges) > 1 and edges[-1][1] - edges[-1][0] < 4000:  # a short rest belongs to the step before
        edges[-2:] = [(edges[-2][0], len(waveform))]
    merged = [
        np.mean([row for s, row in scored.items() if s <= a and b <= min(s + 32000, len(waveform))], axis=0)
        for a, b in edges
    ]
    return edges, np.array(merged)


@pytest.mark.parametrize("block", [3001, audio.BLOCK])
@pytest.mark.parametrize(
    ("rate", "seconds", "channels"), [(44100, 7.3, 2), (16000, 5.0, 1), (4000, 1.3, 1), (8000, 2.0001, 1)]
)
def test_a_stream_is_scored_as_the_whole(monkeypatch, rate, seconds, channels, block):
    monkeypatch.setattr(audio, "BLOCK", block)
    analyzer, samples = tiny_analyzer(), breath(seconds, rate, channels)
    mono = samples.mean(axis=1) if channels > 1 else samples
    waveform = soxr.resample(mono, rate, 16000, quality="HQ")
    edges, expected = one_shot(analyzer, waveform)
    content = wav(samples, rate)
    for found in (analyzer(content), analyzer(io.BytesIO(content)), analyzer(samples, sampling_rate=rate)):
        assert found.duration == len(waveform) / 16000
        np.testing.assert_allclose(found.edges, np.array(edges) / 16000, atol=1e-9)
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6, rtol=0)
    assert len(waveform) < 50000 or np.ptp(expected, axis=0).max() > 0.02, "one opinion of all: the test shows little"


def test_windows_go_through_the_model_in_batches():
    analyzer = tiny_analyzer()
    samples, sizes = breath(12.0), []
    analyzer.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_values"])), with_kwargs=True
    )
    expected = analyzer(samples, 16000)
    assert sizes == [16, 5]
    analyzer.batch_size = 4
    np.testing.assert_allclose(analyzer(samples, 16000).probabilities, expected.probabilities, atol=1e-6, rtol=0)


def test_how_loud_it_was_recorded_does_not_count_where_there_is_a_level(tmp_path):
    analyzer, samples = tiny_analyzer(), 0.1 + breath(5.0)  # a constant offset is no sound
    as_it_is = [analyzer(factor * samples, 16000).probabilities for factor in (1.0, 0.1)]
    assert np.abs(as_it_is[0] - as_it_is[1]).max() > 0.01
    analyzer.level = 0.02
    expected = analyzer(0.02 / samples.std() * samples, 16000).probabilities
    for factor in (1.0, 0.1, 3.0):
        np.testing.assert_allclose(analyzer(factor * samples, 16000).probabilities, expected, atol=1e-5)
        looked = analyzer.attention(factor * samples, 1.0, 2.0, 16000)
        np.testing.assert_allclose(looked, analyzer.attention(samples, 1.0, 2.0, 16000), atol=1e-5)
    soundfile.write(tmp_path / "loud.wav", samples, 16000, subtype="FLOAT")
    with (tmp_path / "loud.wav").open("rb") as file:
        np.testing.assert_allclose(analyzer(file).probabilities, expected, atol=1e-5)
    assert not analyzer(np.zeros(16000), 16000).can_tell


@pytest.mark.parametrize("seconds", [0.5, 9.0])
def test_the_level_is_the_deviation(seconds):
    samples = 0.3 + breath(seconds, 44100)
    assert measure_level(samples, 44100) == pytest.approx(samples.astype(np.float64).std(), rel=1e-4)


def test_window_and_hop_may_be_others():
    analyzer = tiny_analyzer()
    analyzer.window, analyzer.hop = 1.0, 1.0
    samples = breath(4.5)
    found = analyzer(samples, 16000)
    expected = [probabilities(analyzer, samples[16000 * i : 16000 * (i + 1)]) for i in range(4)]
    expected.append(probabilities(analyzer, samples[-16000:]))
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6, rtol=0)
    assert found.edges.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 4.5]]


def test_where_windows_fill_the_input_a_cycle_has_their_mean_over_its_time():
    analyzer, samples = tiny_analyzer(), breath(9.3)
    cycles = [(1.2, 3.45), (0.0, 0.3), (8.9, 12.0), (2.0, 2.01)]
    windows, found = analyzer(samples, 16000), analyzer(samples, 16000, cycles=cycles)
    for row, (start, end) in zip(found.probabilities, cycles, strict=True):
        times = np.arange(start, min(end, 9.3), 1e-3) + 5e-4
        steps = np.minimum(times // 0.5, len(windows.edges) - 1).astype(int)
        np.testing.assert_allclose(row, windows.probabilities[steps].mean(axis=0), atol=1e-3, rtol=0)
    assert found.edges[2].tolist() == [8.9, pytest.approx(9.3)]
    assert len(found.at(0).spans) == len(cycles)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_cycles_are_what_the_pipeline_says_of_them_cut_out(tmp_path, rate):
    """Cut at their own rate as the datasets' builders cut them, resampled each on its own."""
    analyzer = tiny_analyzer()
    analyzer.window = 1.5  # does not fill the model's input
    path = tmp_path / "recording.wav"
    soundfile.write(path, breath(26.0, rate), rate, subtype="PCM_16")
    cycles = [(1.234, 3.456), (0.0, 1.234), (20.0001, 25.9), (0.5, 24.5), (25.0, 27.0), (3.0, 3.01)]
    found = analyzer(path, cycles=cycles)
    classify = pipeline(
        "audio-classification", model=analyzer.model, feature_extractor=analyzer.feature_extractor, top_k=4
    )
    recording = read_wav(path)
    for row, (start, end) in zip(found.probabilities, cycles, strict=True):
        samples, _ = soundfile.read(io.BytesIO(recording.cut(start, end).to_bytes()), dtype="float32")
        waveform = samples if rate == 16000 else soxr.resample(samples, rate, 16000, quality="HQ")
        expected = {answer["label"]: answer["score"] for answer in classify(waveform)}
        assert dict(zip(found.classes, row, strict=True)) == pytest.approx(expected, abs=1e-6)
    assert found.edges.tolist() == [*map(list, cycles[:4]), [25.0, 26.0], [3.0, 3.01]]
    windows = analyzer(path)
    assert (found.duration, found.quality, found.reasons) == (windows.duration, windows.quality, windows.reasons)
    assert len(found.at(0).spans) == len(cycles)


@pytest.mark.parametrize(
    ("cycles", "message"),
    [
        ([], "no cycles"),
        ([(1.0, 1.0)], "From 1.0 to 1.0 s there is nothing to hear"),
        ([(1.0, 1.001)], "nothing to hear"),
        ([(-1.0, 1.0)], "nothing to hear"),
        ([(0.0, float("nan"))], "nothing to hear"),
        ([(0.0, float("inf"))], "nothing to hear"),
        ([(0.0, 1.0), (3.0, 4.0), (3.5, 4.0)], "2 of 3 cycles start after the recording's end"),
    ],
)
def test_cycles_that_are_none(cycles, message):
    with pytest.raises(ValueError, match=message):
        tiny_analyzer()(breath(3.0), 16000, cycles=cycles)


def test_another_threshold_needs_no_model():
    analyzer, samples = tiny_analyzer(), breath(10.0)
    found = analyzer(samples, 16000)
    expected = analyzer(samples, 16000, threshold=0.8)
    analyzer.model = None
    assert found.threshold == 0.5
    assert found.at(0.8).to_dict() == expected.to_dict()
    assert found.at(0.8).to_dict() != found.to_dict()


def test_quality_is_that_of_its_parts():
    analyzer = tiny_analyzer()
    hum = 0.5 * np.sin(2 * np.pi * 50 * np.arange(34 * 16000) / 16000)[:, None] @ np.ones((1, 1))
    samples = breath(34.0) + hum[:, 0].astype(np.float32) * (np.arange(34 * 16000) < 20 * 16000)
    found, extractor = analyzer(samples, 16000), analyzer.feature_extractor
    bounds = [(0, 10), (10, 20), (20, 34)]
    parts = [samples[16000 * start : 16000 * end] for start, end in bounds]
    qualities = [extractor.quality(part) for part in parts]
    assert [(part.start, part.end) for part in found.quality_parts] == bounds
    assert [part.quality for part in found.quality_parts] == pytest.approx(qualities)
    assert [part.reasons for part in found.quality_parts] == [extractor.quality_reasons(part) for part in parts]
    assert found.quality == pytest.approx((10 * qualities[0] + 10 * qualities[1] + 14 * qualities[2]) / 34)
    counts = [sum(reason in part.reasons for part in found.quality_parts) for reason in found.reasons]
    assert counts == sorted(counts, reverse=True)
    assert set(found.reasons) == {reason for part in found.quality_parts for reason in part.reasons} != set()


def test_below_the_threshold_of_quality_nothing_can_be_told():
    analyzer, samples = tiny_analyzer(), breath(3.0)
    quality = analyzer.feature_extractor.quality(samples)
    for threshold, expected in ((quality - 0.01, True), (quality + 0.01, False)):
        analyzer.quality_threshold = threshold
        assert analyzer(samples, 16000).can_tell is expected


def test_a_score_that_does_not_measure_quality_is_not_given():
    analyzer = tiny_analyzer(quality_score="entropy_rms")
    found = analyzer(breath(3.0), 16000)
    assert (found.quality, found.can_tell) == (None, True)
    assert found.quality_parts[0].reasons == found.reasons
    assert json.loads(json.dumps(found.to_dict()))["quality"] is None


@pytest.mark.parametrize("quality_score", ["learned", "entropy_rms"])
@pytest.mark.parametrize("level", [0.0, 0.25])
def test_of_silence_nothing_can_be_told(quality_score, level):
    found = tiny_analyzer(quality_score)(np.full(40000, level, dtype=np.float32), 8000)
    assert found.can_tell is False
    assert np.isfinite(found.probabilities).all()


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.3, 1.99])
def test_a_short_recording_is_one_window(seconds):
    analyzer, samples = tiny_analyzer(), breath(seconds)
    found = analyzer(samples, 16000)
    assert found.duration == pytest.approx(seconds)
    assert len(found.edges) == max(1, int(np.ceil(seconds / 0.5)))
    for row in found.probabilities:
        np.testing.assert_allclose(row, probabilities(analyzer, samples), atol=1e-6)


def test_less_than_a_sample_is_too_short():
    with pytest.raises(ValueError, match="too short"):
        tiny_analyzer()(np.full(1, 0.1), 44100)


def test_clap_and_several_durations_and_two_classes():
    clap = LungSoundAnalyzer(
        QLungForAudioClassification(QLungConfig(audio_config=TINY_CLAP)),
        QLungFeatureExtractor(front_end="clap", duration=1.0),
    )
    assert (clap.window, clap.hop) == (1.0, 0.5)
    assert clap(breath(1.8), 16000).probabilities.shape == (4, 4)
    with pytest.raises(ValueError, match="clap_audio_model"):
        clap.attention(breath(1.7), 0.0, 1.0, 16000)
    mixed = LungSoundAnalyzer(
        tiny_model(id2label={0: "abnormal", 1: "Normal"}, input_frames=[98, 198]),
        QLungFeatureExtractor(duration=2.0, durations=[1.0, 2.0]),
    )
    samples, cycles = breath(5.0), [(0.0, 0.9), (1.0, 2.9), (3.0, 3.5)]
    mixed.window = 1.0
    found = mixed(samples, 16000, cycles=cycles)
    for row, (start, end) in zip(found.probabilities, cycles, strict=True):
        expected = probabilities(mixed, samples[round(16000 * start) : round(16000 * end)])
        np.testing.assert_allclose(row, expected, atol=1e-6)
    assert found.normal == 1
    assert {span.label for span in found.at(0).spans} == {"abnormal"}
    assert found.summary["abnormal"] == pytest.approx(found.probabilities[:, 0].max())


# ---- Checkpoints ----


def save(folder: Path, analyzer: LungSoundAnalyzer, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model().to(dtype).save_pretrained(folder)
    analyzer.feature_extractor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fastest", [torch.float32, torch.bfloat16])
def test_half_precision_is_for_keeping_not_for_computing(tmp_path, monkeypatch, fastest):
    save(tmp_path, tiny_analyzer(), torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    monkeypatch.setattr(analyzer_module, "fastest_dtype", lambda device: fastest)
    opened = LungSoundAnalyzer.from_pretrained(tmp_path)
    assert {value.dtype for value in opened.model.parameters()} == {fastest}
    found, expected = (analyzer(breath(6.0), 16000) for analyzer in (opened, tiny_analyzer()))
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=0.02 if fastest.itemsize == 4 else 0.2)
    assert opened.attention(breath(6.0), 1.0, 2.0, 16000).dtype.kind == "f"


def test_operating_points_of_the_checkpoint_are_taken(tmp_path):
    save(tmp_path, tiny_analyzer())
    plain = LungSoundAnalyzer.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert (plain.window, plain.hop, plain.threshold, plain.quality_threshold) == (2.0, 0.5, 0.5, 0.5)
    assert plain.operating_points is None
    (tmp_path / "operating_points.json").write_text(json.dumps(CONTENT))
    opened = LungSoundAnalyzer.from_pretrained(tmp_path, dtype=torch.float32)
    assert (opened.window, opened.hop, opened.threshold, opened.quality_threshold) == (1.0, 0.25, 0.35, 0.4)
    assert opened.operating_points is not None
    assert opened.operating_points.patients == 50
    found = opened(breath(3.0), 16000)
    assert found.threshold == 0.35
    assert len(found.edges) == 12
    (tmp_path / "operating_points.json").write_text("{}")
    with pytest.raises(ValueError, match=r"operating_points\.json lacks 'about'"):
        LungSoundAnalyzer.from_pretrained(tmp_path)


def test_checkpoints_of_something_else(tmp_path):
    ASTForAudioClassification(ASTConfig(**TINY_AST, max_length=98)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"audio-spectrogram-transformer: give one of a QLung classifier"):
        LungSoundAnalyzer.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="missing"):
        LungSoundAnalyzer.from_pretrained(tmp_path / "missing")
    with pytest.raises(ValueError, match="quiet, loud: one must be named normal"):
        LungSoundAnalyzer(tiny_model(id2label={0: "quiet", 1: "loud"}), QLungFeatureExtractor(duration=2.0))


# ---- Attention ----


def test_attention_of_what_fills_the_input_is_the_map_itself():
    analyzer, samples = tiny_analyzer(), breath(6.0)
    found = analyzer.attention(samples, 1.0, 3.0, 16000)
    expected = attention_map(analyzer.model, analyzer.feature_extractor, samples[16000:48000]).T
    assert found.shape == expected.shape == (8, 12)
    # The patches' centres lie 8 to 184 frames into 198, the columns' equally spaced from 8.25 to 189.75.
    columns = (np.arange(12) + 0.5) / 12 * 198
    nearest = np.abs(columns[:, None] - (8 + 16 * np.arange(12))).argmin(axis=1)
    np.testing.assert_allclose(found, expected[:, nearest], atol=0.4 * np.ptp(expected))
    assert analyzer.model.config._attn_implementation == "sdpa"


def test_attention_to_repetitions_comes_back_to_the_span(monkeypatch):
    """A map that tells where its patches' centres lie in the padded clip, in frames."""
    analyzer = tiny_analyzer()
    centres = 8.0 + 16 * np.arange(12)
    monkeypatch.setattr(analyzer_module, "attention_map", lambda *_: np.tile(centres % 64, (8, 1)).T)
    found = analyzer.attention(breath(6.0), 1.0, 1.64, 16000)  # 64 frames: four patches, three times
    np.testing.assert_allclose(found, np.tile([8.0, 24.0, 40.0, 56.0], (8, 1)))
    monkeypatch.setattr(analyzer_module, "attention_map", lambda *_: np.tile(centres, (8, 1)).T)
    analyzer.feature_extractor.padding = "zero"
    np.testing.assert_allclose(analyzer.attention(breath(6.0), 1.0, 1.64, 16000)[0], [8.0, 24.0, 40.0, 56.0])
    analyzer.feature_extractor.padding = "zero_centered"
    found = analyzer.attention(breath(6.0), 1.0, 1.64, 16000)
    np.testing.assert_allclose(found[0], 67 + np.array([8.0, 24.0, 40.0, 56.0]))  # half of 198 - 64 frames before
    analyzer.feature_extractor.padding = "cyclic"
    assert analyzer.attention(breath(6.0), 0.5, 5.5, 16000).shape == (8, 3 * 10)  # three windows of 1.67 s


@pytest.mark.parametrize(("start", "end"), [(7.0, 8.0), (2.0, 1.0), (-1.0, 1.0)])
def test_attention_needs_a_span_within_the_recording(start, end):
    with pytest.raises(ValueError, match=r"after the recording's end|nothing to hear"):
        tiny_analyzer().attention(breath(6.0), start, end, 16000)


def test_several_people_at_once_get_their_own_answers():
    analyzer = tiny_analyzer()
    recordings = [breath(3.0 + index, seed=index) for index in range(6)]
    expected = [analyzer(samples, 16000).probabilities for samples in recordings]
    maps = [analyzer.attention(samples, 0.5, 2.5, 16000) for samples in recordings]
    with ThreadPoolExecutor(6) as pool:
        scored = [pool.submit(analyzer, samples, 16000) for samples in recordings for _ in range(2)]
        looked = [pool.submit(analyzer.attention, samples, 0.5, 2.5, 16000) for samples in recordings for _ in range(2)]
        for index, job in enumerate(scored):
            np.testing.assert_allclose(job.result().probabilities, expected[index // 2], atol=1e-5)
        for index, job in enumerate(looked):
            np.testing.assert_allclose(job.result(), maps[index // 2], atol=1e-5)
    assert analyzer.model.config._attn_implementation == "sdpa"


# ---- Memory and real recordings ----

MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.inference.test_analyzer import peak_memory, tiny_analyzer
torch.set_num_threads(1)
analyzer = tiny_analyzer()
analyzer.window = analyzer.hop = 1.0
analyzer.feature_extractor.quality_reasons = lambda part: []  # the slowest step of all
for seconds in (40, 600):
    durations = [
        analyzer(f"{seconds}.wav").duration,
        analyzer(f"{seconds}.wav", cycles=[(start, start + 1) for start in range(0, seconds, 20)]).duration,
    ]
    print(*durations, peak_memory())
"""


def peak_memory() -> int:
    """Of this process since its program started, in KiB; `getrusage` would count its parent's as well."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc: memory is not measured")
def test_memory_does_not_grow_with_length(tmp_path):
    """Ten minutes at 44.1 kHz would take 101 MiB as float32, and their windows' features 58."""
    for seconds in (40, 600):
        soundfile.write(tmp_path / f"{seconds}.wav", np.tile(breath(10, 44100), seconds // 10), 44100)
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parents[2])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    short, long = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    assert (short[:2], long[:2]) == ([40, 40], [600, 600])
    print(f"{short[2] / 1024:.0f} MiB after 40 s, {long[2] / 1024:.0f} MiB after 600 s")
    assert long[2] - short[2] < 24 * 1024


def check_real(analyzer: LungSoundAnalyzer, path: Path) -> None:
    found = analyzer(path)
    samples, rate = soundfile.read(path, dtype="float32")
    assert found.duration == pytest.approx(len(samples) / rate, abs=1e-4)
    edges, expected = one_shot(analyzer, soxr.resample(samples, rate, 16000, quality="HQ"))
    np.testing.assert_allclose(found.edges, np.array(edges) / 16000, atol=1e-9)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6, rtol=0)
    assert found.quality is not None
    assert 0 <= found.quality <= 1


def test_real_icbhi_recordings(real_icbhi, tmp_path):
    analyzer = LungSoundAnalyzer.from_pretrained(save(tmp_path, tiny_analyzer()), dtype=torch.float32)
    files = sorted((real_icbhi / "ICBHI_final_database").glob("*.wav"))
    infos = sorted((soundfile.info(file) for file in files), key=lambda info: -info.duration)
    shortest = {info.samplerate: Path(info.name) for info in infos}
    assert set(shortest) == {4000, 44100}
    for file in shortest.values():
        check_real(analyzer, file)
        cycles = [(start, end) for start, end, *_ in np.loadtxt(file.with_suffix(".txt"), ndmin=2)]
        found = analyzer(file, cycles=cycles)
        assert found.probabilities.shape == (len(cycles), 4)


def test_real_sprsound_recordings(real_sprsound, tmp_path):
    """Whose headers are malformed."""
    analyzer = LungSoundAnalyzer.from_pretrained(save(tmp_path, tiny_analyzer()), dtype=torch.float32)
    files = sorted((real_sprsound / "BioCAS2022" / "train2022_wav").glob("*.wav"), key=lambda file: file.stat().st_size)
    for file in (files[0], files[-1]):
        check_real(analyzer, file)
