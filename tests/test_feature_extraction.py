import json
import warnings

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, ClapFeatureExtractor

import hf_datasets
from modeling_qlung import QLungFeatureExtractor
from modeling_qlung.filterbank_qlung import ClapFilterbank, KaldiFilterbank
from modeling_qlung.inference import read_audio


def kaldi_features(clip: torch.Tensor, extractor: QLungFeatureExtractor) -> torch.Tensor:
    """torchaudio's Kaldi filterbank with Patch-Mix's settings, normalised."""
    features = torchaudio.compliance.kaldi.fbank(
        clip[None],
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )
    return (features - extractor.mean) / (2 * extractor.std)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def test_every_real_cycle_matches_kaldi(real_icbhi, tmp_path):
    extractor = QLungFeatureExtractor()
    cycles = hf_datasets.load("icbhi", real_icbhi, allow_missing_audio=True, cache_dir=tmp_path)
    audio = [row["bytes"] for split in cycles.values() for row in split.data.column("audio").to_pylist()]
    assert len(audio) == 533
    largest = 0.0
    for row in audio:
        waveform = read_audio(row)
        ours = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_values[0]
        theirs = kaldi_features(extractor.fit_length(torch.from_numpy(waveform)), extractor)
        assert ours.shape == theirs.shape == (798, 128)
        largest = max(largest, (ours - theirs).abs().max().item())
    print(f"largest difference from torchaudio's Kaldi filterbank over {len(audio)} cycles: {largest:.1e}")
    assert largest <= 1e-3


@pytest.mark.parametrize("samples", [400, 401, 15999, 128000])
def test_filterbank_matches_kaldi_at_any_length(samples):
    clip = torch.from_numpy(noise(samples))
    extractor = QLungFeatureExtractor(mean=0.0, std=0.5)
    ours = KaldiFilterbank()(clip[None])[0]
    torch.testing.assert_close(ours, kaldi_features(clip, extractor), atol=1e-3, rtol=0)


def test_silence_is_floored_as_in_kaldi():
    clip = torch.zeros(1600)
    extractor = QLungFeatureExtractor(mean=0.0, std=0.5)
    torch.testing.assert_close(KaldiFilterbank()(clip[None])[0], kaldi_features(clip, extractor))


def test_shorter_cycles_repeat_and_fade_out_only_at_the_end():
    extractor = QLungFeatureExtractor(duration=1.0)
    cycle = torch.from_numpy(noise(6000))
    clip = extractor.fit_length(cycle)
    expected = torch.cat([cycle, cycle, cycle[:4000]])
    assert torch.equal(clip[:15000], expected[:15000])
    torch.testing.assert_close(clip[15000:], expected[15000:] * torch.linspace(1, 0, 1000))
    assert clip[-1] == 0


def test_longer_cycles_are_cut_and_not_faded():
    cycle = torch.from_numpy(noise(20000))
    assert torch.equal(QLungFeatureExtractor(duration=1.0).fit_length(cycle), cycle[:16000])


def test_fade_in_and_zero_padding():
    cycle = torch.ones(8000)
    clip = QLungFeatureExtractor(duration=1.0, padding="zero", fade_in=0.1, fade_out=0.0).fit_length(cycle)
    torch.testing.assert_close(clip[:1600], torch.linspace(0, 1, 1600))
    assert torch.equal(clip[1600:8000], torch.ones(6400))
    assert torch.equal(clip[8000:], torch.zeros(8000))
    assert torch.equal(cycle, torch.ones(8000)), "the caller's waveform was changed"


def test_centered_zero_padding_has_as_much_silence_on_either_side():
    cycle = torch.from_numpy(noise(8001))
    clip = QLungFeatureExtractor(duration=1.0, padding="zero_centered", fade_out=0.0).fit_length(cycle)
    torch.testing.assert_close(clip, torch.cat([torch.zeros(3999), cycle, torch.zeros(4000)]), rtol=0, atol=0)


def test_further_frames_are_zero_before_normalisation_as_in_transformers():
    waveform = noise(128000)
    ours = QLungFeatureExtractor(num_frames=1024)(waveform, sampling_rate=16000, return_tensors="pt").input_values
    theirs = ASTFeatureExtractor(max_length=1024)(waveform, sampling_rate=16000, return_tensors="pt").input_values
    assert ours.shape == (1, 1024, 128)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert ours[0, 900, 0] == pytest.approx(4.2677393 / (2 * 4.5689974))


def test_fewer_frames_cut():
    ours = QLungFeatureExtractor(num_frames=100)(noise(128000), sampling_rate=16000, return_tensors="pt")
    full = QLungFeatureExtractor()(noise(128000), sampling_rate=16000, return_tensors="pt")
    assert torch.equal(ours.input_values, full.input_values[:, :100])


def test_a_batch_equals_its_items_and_takes_every_kind_of_waveform():
    extractor = QLungFeatureExtractor(duration=1.0)
    first, second = noise(9000, 1), noise(30000, 2)
    batch = extractor([first, torch.from_numpy(second)], sampling_rate=16000, return_tensors="pt").input_values
    assert batch.shape == (2, 98, 128)
    for index, waveform in enumerate((first.tolist(), second)):
        single = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_values[0]
        assert torch.equal(batch[index], single)
    assert isinstance(extractor(first, sampling_rate=16000).input_values[0], np.ndarray)
    assert extractor(first, sampling_rate=16000, return_tensors="np").input_values.shape == (1, 98, 128)


def test_a_batch_computed_at_once_equals_one_at_a_time():
    """What a GPU computes in one batch, and a CPU clip by clip."""
    clips = torch.stack([torch.from_numpy(noise(16000, seed)) for seed in range(3)])
    together = KaldiFilterbank()(clips)
    apart = torch.cat([KaldiFilterbank()(clip[None]) for clip in clips])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (noise(100), 8000, r"8000 Hz and the model's 16000 Hz: resample"),
        (np.zeros(0, np.float32), 16000, "empty"),
        ([], 16000, "empty"),
        (np.array([0.0, np.nan], np.float32), 16000, "NaN"),
        (np.array([0.0, np.inf], np.float32), 16000, "infinite"),
        (np.zeros((2, 100), np.float32), 16000, r"shape \(2, 100\).*average the channels"),
        ([noise(10), np.zeros((100, 2), np.float32)], 16000, r"Waveform 1 has shape \(100, 2\)"),
        (np.zeros(100, np.int16), 16000, "int16.*float"),
        ("cycle.wav", 16000, r"Waveform 0 is 'cycle\.wav': read the file first"),
        (None, 16000, "Waveform 0 is None: read the file first"),
        (0.5, 16000, r"Waveform 0 has shape \(\)"),
        ([0.1, None], 16000, "Waveform 0 holds object: give its samples as numbers"),
    ],
)
def test_wrong_input_is_named(waveform, rate, message):
    with pytest.raises(ValueError, match=message):
        QLungFeatureExtractor()(waveform, sampling_rate=rate)


@pytest.mark.parametrize("score", ["entropy_rms", "learned"])
def test_quality_and_its_reasons_refuse_integers_too(score):
    extractor = QLungFeatureExtractor(quality_score=score)
    for measure in (extractor.quality, extractor.quality_reasons):
        with pytest.raises(ValueError, match=r"int16.*float"):
            measure(np.zeros(100, np.int16))


def test_samples_may_lie_in_memory_as_they_like():
    samples = noise(16000)
    read_only = samples.copy()
    read_only.flags.writeable = False
    expected = QLungFeatureExtractor()(samples, sampling_rate=16000)["input_values"][0]
    with warnings.catch_warnings(action="error"):
        for same in (samples[::-1].copy()[::-1], samples.astype(">f4"), read_only, samples.astype(np.float64)):
            given = QLungFeatureExtractor()(same, sampling_rate=16000)["input_values"][0]
            np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "mirror"},
        {"duration": 0.01},
        {"fade_out": 9.0},
        {"fade_in": -1.0},
        {"std": 0.0},
        {"num_frames": 0},
        {"quality_normalization": "softmax"},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QLungFeatureExtractor(**options)


def test_the_preparation_is_saved_with_the_checkpoint(tmp_path):
    statistics = {"entropy": [0.2, 0.7], "rms": [0.01, 0.2]}
    extractor = QLungFeatureExtractor(
        duration=2.0, mean=-3.0, std=2.0, quality_normalization="percentile", quality_statistics=statistics
    )
    extractor.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.to_dict() == extractor.to_dict()
    one, other = (e(noise(9000), sampling_rate=16000, return_quality=True) for e in (extractor, loaded))
    assert np.array_equal(one.input_values[0], other.input_values[0])
    assert one.quality == other.quality


def test_quality_is_measured_on_the_waveform_as_recorded(tmp_path):
    waveform = noise(5000)
    short, long = QLungFeatureExtractor(duration=1.0), QLungFeatureExtractor(duration=8.0, fade_in=0.1)
    expected = short.quality(waveform)
    for extractor in (short, long):
        quality = extractor([waveform, waveform], sampling_rate=16000, return_quality=True, return_tensors="pt").quality
        assert quality.tolist() == pytest.approx([expected, expected])


# ---- CLAP's front end ----


def clap_features(clip: torch.Tensor) -> torch.Tensor:
    """Transformers' own extractor, with the settings of laion/clap-htsat-unfused, on a clip of its full length."""
    reference = ClapFeatureExtractor(frequency_min=50, frequency_max=14000, truncation="rand_trunc")
    prepared = reference(clip.numpy(), sampling_rate=48000, max_length=len(clip), return_tensors="pt")
    return prepared.input_features[0, 0]


def clap_extractor(**options) -> QLungFeatureExtractor:
    return QLungFeatureExtractor(front_end="clap", **options)


def test_real_recordings_match_claps_own_extractor(real_icbhi, tmp_path):
    """To 1e-3 dB, also where a 4 kHz recording leaves nothing but rounding above 2 kHz."""
    extractor = clap_extractor()
    cycles = hf_datasets.load("icbhi", real_icbhi, allow_missing_audio=True, cache_dir=tmp_path)
    audio = [row["bytes"] for split in cycles.values() for row in split.data.column("audio").to_pylist()][::20]
    largest = 0.0
    for row in audio:
        waveform = read_audio(row, 48000)
        ours = extractor(waveform, sampling_rate=48000, return_tensors="pt").input_values[0]
        theirs = clap_features(extractor.fit_length(torch.from_numpy(waveform)))
        assert ours.shape == theirs.shape == (801, 64)
        largest = max(largest, (ours - theirs).abs().max().item())
    print(f"largest difference from Transformers' CLAP extractor over {len(audio)} cycles: {largest:.1e} dB")
    assert largest <= 1e-3


@pytest.mark.parametrize("samples", [1024, 1025, 1439, 48000])
def test_claps_filterbank_matches_at_any_length(samples):
    clip = torch.from_numpy(noise(samples))
    ours = ClapFilterbank()(clip[None])[0]
    assert len(ours) == ClapFilterbank().num_frames(samples) == 1 + samples // 480
    torch.testing.assert_close(ours, clap_features(clip), atol=1e-3, rtol=0)


def test_claps_weak_bands_are_not_filled_with_rounding():
    """Nothing but a loud low tone: the bands far above it hold its rounding, where float32 is 0.06 dB off."""
    time = np.arange(48000) / 48000
    clip = torch.from_numpy((0.9 * np.sin(2 * np.pi * 300 * time)).astype(np.float32))
    torch.testing.assert_close(ClapFilterbank()(clip[None])[0], clap_features(clip), atol=1e-3, rtol=0)


def test_silence_is_floored_as_in_clap():
    clip = torch.zeros(4800)
    assert torch.equal(ClapFilterbank()(clip[None])[0], clap_features(clip))
    assert (ClapFilterbank()(clip[None]) == -100).all()


def test_claps_clips_at_once_equal_one_at_a_time():
    clips = torch.stack([torch.from_numpy(noise(48000, seed)) for seed in range(3)])
    apart = torch.cat([ClapFilterbank()(clip[None]) for clip in clips])
    torch.testing.assert_close(ClapFilterbank()(clips), apart, atol=1e-4, rtol=0)


def test_claps_geometry_follows_from_its_front_end():
    assert (clap_extractor().feature_size, clap_extractor().sampling_rate) == (64, 48000)
    assert (clap_extractor().num_samples, clap_extractor().max_length) == (384000, 801)
    assert clap_extractor(duration=10.0).max_length == 1001
    assert (QLungFeatureExtractor().num_samples, QLungFeatureExtractor().max_length) == (128000, 798)
    assert clap_extractor(num_frames=400).max_length == 400
    with pytest.raises(ValueError, match=r"num_frames is 1024, and 8\.0 s hold 801"):
        clap_extractor(num_frames=1024)
    with pytest.raises(ValueError, match="sampling_rate is 44100 Hz; CLAP's front end is made for 48000 Hz"):
        clap_extractor(sampling_rate=44100)
    with pytest.raises(ValueError, match=r"duration is 0\.02 s; it must hold one frame of 0\.02133 s"):
        clap_extractor(duration=0.02)
    with pytest.raises(ValueError, match="front_end is 'mfcc'; choose one of kaldi, clap"):
        QLungFeatureExtractor(front_end="mfcc")


def test_claps_cycles_repeat_and_its_values_may_be_normalised(tmp_path):
    waveform = noise(30000)
    plain = clap_extractor(duration=1.0)
    clip = plain.fit_length(torch.from_numpy(waveform))
    assert torch.equal(clip[30000:45000], clip[:15000])
    values = plain(waveform, sampling_rate=48000, return_tensors="pt").input_values
    torch.testing.assert_close(values[0], clap_features(clip), atol=1e-3, rtol=0)
    fitted = clap_extractor(duration=1.0, mean=-50.0, std=10.0)
    normalised = fitted(waveform, sampling_rate=48000, return_tensors="pt").input_values
    torch.testing.assert_close(normalised, (values + 50) / 20)
    fitted.save_pretrained(tmp_path)
    assert AutoFeatureExtractor.from_pretrained(tmp_path).to_dict() == fitted.to_dict()


def test_quality_is_the_same_at_either_front_ends_rate(real_icbhi, real_sprsound):
    files = sorted((real_icbhi / "ICBHI_final_database").glob("*.wav"))[::6]
    files += sorted((real_sprsound / "BioCAS2022" / "train2022_wav").glob("*.wav"))[::200]
    differences = [
        abs(QLungFeatureExtractor().quality(read_audio(file)) - clap_extractor().quality(read_audio(file, 48000)))
        for file in files
    ]
    print(f"largest difference of the quality score between 16 and 48 kHz, {len(files)} files: {max(differences):.1e}")
    assert max(differences) < 1e-3


def test_reading_averages_channels_and_resamples(tmp_path):
    time = np.arange(44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 400 * time)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, np.zeros_like(tone)], axis=1), 44100, subtype="PCM_24")
    waveform = read_audio(tmp_path / "tone.wav")
    assert waveform.shape == (16000,)
    expected = 0.25 * np.sin(2 * np.pi * 400 * np.arange(16000) / 16000)
    np.testing.assert_allclose(waveform[200:-200], expected[200:-200], atol=1e-3)
    assert np.array_equal(read_audio((tmp_path / "tone.wav").read_bytes()), waveform)


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.wav"):
        read_audio(tmp_path / "nothing.wav")
    (tmp_path / "text.wav").write_text("not a sound")
    with pytest.raises(ValueError, match=r"text\.wav cannot be read as audio"):
        read_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match="no sample"):
        read_audio(tmp_path / "empty.wav")


# ---- Several durations ----


def three_durations(**options) -> QLungFeatureExtractor:
    return QLungFeatureExtractor(duration=2.0, durations=[0.5, 1.0, 2.0], **options)


@pytest.mark.parametrize(
    ("samples", "duration"), [(100, 0.5), (8000, 0.5), (8001, 1.0), (16000, 1.0), (16001, 2.0), (40000, 2.0)]
)
def test_a_waveform_gets_the_smallest_duration_that_holds_it(samples, duration):
    waveform = noise(samples)
    ours = three_durations()(waveform, sampling_rate=16000, return_tensors="pt")
    alone = QLungFeatureExtractor(duration=duration)(waveform, sampling_rate=16000, return_tensors="pt")
    assert torch.equal(ours.input_values, alone.input_values)
    assert ours.num_frames.tolist() == [alone.input_values.shape[1]]


def test_a_mixed_batch_holds_each_as_it_is_alone():
    extractor = three_durations()
    waveforms = [noise(30000, 1), noise(5000, 2), noise(12000, 3), noise(7000, 4)]
    alone = [extractor(waveform, sampling_rate=16000).input_values[0] for waveform in waveforms]
    assert [len(features) for features in alone] == [198, 48, 98, 48]
    for kind in ("pt", "np"):
        batch = extractor(waveforms, sampling_rate=16000, return_tensors=kind)
        assert batch.input_values.shape == (4, 198, 128)
        assert batch.num_frames.tolist() == [198, 48, 98, 48]
        for features, frames, single in zip(batch.input_values, batch.num_frames, alone, strict=True):
            np.testing.assert_array_equal(np.asarray(features[:frames]), single)
            assert not features[frames:].any()
    listed = extractor(waveforms, sampling_rate=16000, return_quality=True)
    for features, single in zip(listed.input_values, alone, strict=True):
        np.testing.assert_array_equal(features, single)
    assert len(listed.quality) == 4


def test_durations_are_saved_with_the_checkpoint_and_may_be_absent_from_it(tmp_path):
    extractor = three_durations()
    assert (extractor.num_samples, extractor.max_length, extractor.input_frames) == (32000, 198, [48, 98, 198])
    extractor.save_pretrained(tmp_path)
    assert AutoFeatureExtractor.from_pretrained(tmp_path).to_dict() == extractor.to_dict()
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del written["durations"]  # as in checkpoints from before there were several
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    before = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert before.to_dict() == {**QLungFeatureExtractor(duration=2.0).to_dict(), "auto_map": written["auto_map"]}
    assert before(noise(100), sampling_rate=16000, return_tensors="pt").keys() == {"input_values"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"durations": [2.0, 4.0]}, r"durations are \[2\.0, 4\.0\].*the last one the duration of 8\.0 s"),
        ({"durations": [4.0, 2.0, 8.0]}, "ascending order"),
        ({"durations": [2.0, 2.0, 8.0]}, "ascending order"),
        ({"durations": [8.0]}, "give two or more"),
        ({"durations": [0.01, 8.0]}, r"duration is 0\.01 s; it must hold one frame"),
        ({"durations": [0.05, 8.0]}, r"fade_out 0\.0625 s; both must be within \[0, 0\.05\]"),
        ({"durations": [2.0, 8.0], "num_frames": 1024}, "num_frames is 1024, but durations give each clip its own"),
        ({"durations": [2.0, 8.0], "front_end": "clap"}, "CLAP stretches all input to one grid"),
    ],
)
def test_wrong_durations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        QLungFeatureExtractor(**options)
