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
    features, clips = make_features(), torch.linspace(-0.5, 0.5, 1000).repeat(2, 1)
    for augment, example in (
        (SpecAugment(), features),
        (WaveformAugment(gain=(0.5, 2.0), gain_probability=1.0), clips),
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
        WaveformAugment()(torch.ones(2, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        WaveformAugment()(torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gain_and_noise_follow_their_probabilities(dtype):
    clips = torch.full((2000, 400), 0.5, dtype=dtype)
    augmented = WaveformAugment()(clips, torch.Generator().manual_seed(7))
    assert augmented.dtype == dtype
    assert torch.equal(clips, torch.full_like(clips, 0.5))
    gains, spreads = augmented.mean(dim=1).numpy() / 0.5, augmented.std(dim=1).numpy()
    gained, noisy = np.abs(gains - 1) > 1e-4, spreads > 1e-6
    assert 0.45 < gained.mean() < 0.55
    assert 0.45 < noisy.mean() < 0.55
    assert 0.2 < (gained & noisy).mean() < 0.3
    assert gains.min() > 0.9 - 1e-4
    assert gains.max() < 1.1 + 1e-4
    assert abs(gains[gained].std() - 0.2 / np.sqrt(12)) < 3e-3
    assert spreads[noisy].mean() == pytest.approx(1e-4, rel=0.02)


def test_clips_are_changed_one_by_one_from_the_same_draws():
    """A batch is what a loop over its clips gives: three numbers for each, and its noise if it gets any."""
    augment, clips = WaveformAugment(gain=(0.5, 2.0), noise_std=0.1), torch.randn(12, 100)
    generator = torch.Generator().manual_seed(3)
    expected = []
    for clip in clips:
        gained, noisy, position = torch.rand(3, generator=generator)
        changed = clip * (0.5 + 1.5 * position) if gained < 0.5 else clip
        expected.append(changed + 0.1 * torch.randn(100, generator=generator) if noisy < 0.5 else changed)
    torch.testing.assert_close(augment(clips, torch.Generator().manual_seed(3)), torch.stack(expected))


def test_gain_alone_is_exact():
    clips = torch.linspace(-1, 1, 100).repeat(3, 1)
    augmented = WaveformAugment(gain=(2.0, 2.0), gain_probability=1.0, noise_probability=0.0)(clips)
    assert torch.equal(augmented, 2 * clips)
    untouched = WaveformAugment(gain_probability=0.0, noise_probability=0.0)(clips)
    assert torch.equal(untouched, clips)
    assert untouched.data_ptr() != clips.data_ptr()
