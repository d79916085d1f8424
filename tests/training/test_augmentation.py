import numpy as np
import pytest
import scipy.stats
import torch

from modeling_qlung.training.augmentation import SpecAugment, WaveformAugment


def make_features(batch=6, frames=300, mel=128):
    return torch.randn(batch, frames, mel, generator=torch.Generator().manual_seed(0))


def masked_runs(rows):
    """Width and start of the one masked run in each row of a boolean matrix."""
    for row in rows:
        (places,) = torch.where(row)
        assert len(places) == 0 or int(places[-1] - places[0]) + 1 == len(places)
        yield len(places), int(places[0]) if len(places) else 0


@pytest.mark.parametrize("axis", [1, 2])
def test_widths_are_those_of_torchaudio(axis):
    """The same seed draws the same widths, item by item; only where a mask starts differs."""
    mask = pytest.importorskip("torchaudio").functional.mask_along_axis_iid
    features = make_features()
    augment = SpecAugment(freq_masks=axis - 1, freq_width=48, time_masks=2 - axis, time_width=48, fill=0.0)
    torch.manual_seed(4)
    ours = augment(features)
    torch.manual_seed(4)
    expected = mask(features, 48, 0.0, axis)
    assert torch.equal((ours == 0).sum((1, 2)), (expected == 0).sum((1, 2)))
    assert len((ours == 0).sum((1, 2)).unique()) > 1


def test_widths_and_starts_are_uniform():
    ones = torch.ones(20_000, 1, 20)
    masked = SpecAugment(freq_masks=1, freq_width=5, time_masks=0, fill=0.0)(ones, torch.Generator().manual_seed(1))
    runs = list(masked_runs(masked[:, 0] == 0))
    widths = np.bincount([width for width, _ in runs])
    assert scipy.stats.chisquare(widths).pvalue > 1e-3
    assert len(widths) == 5
    starts = np.bincount([start for width, start in runs if width == 4])
    assert scipy.stats.chisquare(starts).pvalue > 1e-3
    assert len(starts) == 17


def test_the_fill_is_the_items_own_mean_before_masking():
    features = make_features() + torch.arange(6.0)[:, None, None]
    masked = SpecAugment()(features, torch.Generator().manual_seed(2))
    for before, after in zip(features, masked, strict=True):
        changed = before != after
        assert changed.any()
        torch.testing.assert_close(after[changed], before.mean().expand(int(changed.sum())))


def test_input_stays_and_masks_cover_whole_rows_and_columns():
    features = make_features()
    copy = features.clone()
    masked = SpecAugment(fill=-7.0)(features)
    assert torch.equal(features, copy)
    hidden = masked == -7.0
    times, bins = hidden.all(dim=2), hidden.all(dim=1)
    assert torch.equal(hidden, times[:, :, None] | bins[:, None, :])


def test_widths_beyond_the_axis_are_limited():
    short = torch.ones(200, 3, 2, dtype=torch.bfloat16)
    masked = SpecAugment(freq_width=48, time_width=160, freq_masks=1, time_masks=1, fill=0.0)(short)
    assert masked.dtype == torch.bfloat16
    hidden = masked == 0
    assert not hidden.flatten(1).all(1).any()
    assert hidden.flatten(1).any(1).float().mean() > 0.5


def test_no_masks_no_change():
    features = make_features()
    assert torch.equal(SpecAugment(freq_masks=0, time_masks=0)(features), features)
    assert torch.equal(SpecAugment(freq_width=0, time_width=0)(features), features)


def test_seeds_decide():
    features, waveform = make_features(), np.linspace(-0.5, 0.5, 1000, dtype=np.float32)
    for augment, example in (
        (SpecAugment(), features),
        (WaveformAugment(gain=(0.5, 2.0), gain_probability=1.0), waveform),
    ):
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            results.append(np.asarray(augment(example)))
        given = np.asarray(augment(example, torch.Generator().manual_seed(5)))
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], given)
        assert not np.array_equal(results[0], results[2])


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, frames, mel\)"):
        SpecAugment()(torch.ones(3, 4))
    with pytest.raises(ValueError, match="fill"):
        SpecAugment(fill="median")
    with pytest.raises(ValueError, match="time_width"):
        SpecAugment(time_width=-1)
    with pytest.raises(ValueError, match="int16"):
        WaveformAugment()(np.ones(4, dtype=np.int16))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        WaveformAugment()(torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gain_and_noise_follow_their_probabilities(dtype):
    generator = torch.Generator().manual_seed(7)
    waveform = np.full(400, 0.5, dtype=dtype)
    waveform.flags.writeable = False
    augmented = [WaveformAugment()(waveform, generator) for _ in range(2000)]
    gains = np.array([signal.mean() / 0.5 for signal in augmented])
    spreads = np.array([signal.std() for signal in augmented])
    gained, noisy = np.abs(gains - 1) > 1e-4, spreads > 1e-6
    assert augmented[0].dtype == dtype
    assert 0.45 < gained.mean() < 0.55
    assert 0.45 < noisy.mean() < 0.55
    assert 0.2 < (gained & noisy).mean() < 0.3
    assert gains.min() > 0.9 - 1e-4
    assert gains.max() < 1.1 + 1e-4
    assert abs(gains[gained].std() - 0.2 / np.sqrt(12)) < 3e-3
    assert spreads[noisy].mean() == pytest.approx(1e-4, rel=0.02)


def test_gain_alone_is_exact_and_tensors_stay_tensors():
    waveform = torch.linspace(-1, 1, 100)
    augmented = WaveformAugment(gain=(2.0, 2.0), gain_probability=1.0, noise_probability=0.0)(waveform)
    assert torch.equal(augmented, 2 * waveform)
    untouched = WaveformAugment(gain_probability=0.0, noise_probability=0.0)(waveform)
    assert torch.equal(untouched, waveform)
    assert untouched.data_ptr() != waveform.data_ptr()
