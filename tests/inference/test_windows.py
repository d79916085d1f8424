"""Windows, parts and sections of a stream, against what slicing the whole array gives."""

import numpy as np
import pytest

from modeling_qlung.inference.windows import consecutive_parts, merge_windows, sliding_windows, tap_sections


def split(samples: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut into blocks of random lengths, some of them empty."""
    return np.split(samples, np.sort(rng.integers(0, len(samples) + 1, size=rng.integers(0, 12))))


CASES = [
    (total, length, hop) for total in (1, 3, 8, 9, 16, 17, 40, 41, 100) for length, hop in ((8, 2), (8, 8), (9, 4))
]


@pytest.mark.parametrize(("total", "length", "hop"), CASES)
def test_windows_cover_the_recording_exactly(total, length, hop):
    samples = np.arange(1, total + 1, dtype=np.float32)
    starts = [0, *range(hop, total - length + 1, hop)]
    if starts[-1] + length < total:
        starts.append(total - length)
    for seed in range(5):
        found = list(sliding_windows(split(samples, np.random.default_rng(seed)), length, hop))
        assert [start for start, _ in found] == starts
        for start, window in found:
            assert np.array_equal(window, samples[start : start + length])


@pytest.mark.parametrize(("total", "length", "hop"), CASES)
def test_a_step_is_the_mean_of_the_windows_that_cover_it(total, length, hop):
    rng = np.random.default_rng(0)
    found = list(sliding_windows([np.zeros(total, dtype=np.float32)], length, hop))
    starts, lengths = [start for start, _ in found], [len(window) for _, window in found]
    values = rng.random((len(found), 3))
    edges, merged = merge_windows(starts, lengths, values, hop)
    assert edges[0, 0] == 0
    assert edges[-1, 1] == total
    assert np.array_equal(edges[1:, 0], edges[:-1, 1])
    assert set(np.diff(edges[:-1]).ravel()) <= {hop}
    shortest = min(hop // 2 if 2 * length >= 3 * hop else 1, total)
    assert shortest <= np.diff(edges[-1]) < hop + shortest
    for (begin, end), row in zip(edges, merged, strict=True):
        covering = [
            value
            for start, size, value in zip(starts, lengths, values, strict=True)
            if set(range(begin, end)) <= set(range(start, start + size))
        ]
        np.testing.assert_allclose(row, np.mean(covering, axis=0), atol=1e-12)


@pytest.mark.parametrize("total", [1, 9, 10, 19, 20, 21, 30, 39, 40, 95])
def test_parts_follow_one_another_and_none_is_short(total):
    samples = np.arange(total, dtype=np.float32)
    for seed in range(5):
        parts = list(consecutive_parts(split(samples, np.random.default_rng(seed)), 10))
        assert np.array_equal(np.concatenate(parts), samples)
        assert [len(part) for part in parts[:-1]] == [10] * (len(parts) - 1)
        assert len(parts[-1]) < 20
        assert len(parts) == 1 or len(parts[-1]) >= 10


def test_sections_come_out_in_any_order_and_blocks_pass() -> None:
    samples = np.arange(50, dtype=np.float32)
    sections = [(30, 45), (0, 1), (5, 35), (5, 20), (49, 80), (50, 60), (70, 80), (0, 50)]
    for seed in range(10):
        found: list[tuple[int, np.ndarray]] = []
        passed = list(tap_sections(split(samples, np.random.default_rng(seed)), sections, found))
        assert np.array_equal(np.concatenate(passed), samples)
        assert sorted(index for index, _ in found) == [0, 1, 2, 3, 4, 7]  # two lie beyond the end
        for index, section in found:
            assert np.array_equal(section, samples[slice(*sections[index])])


def test_a_section_is_there_as_soon_as_its_last_sample() -> None:
    found: list[tuple[int, np.ndarray]] = []
    blocks = tap_sections(iter(np.arange(40, dtype=np.float32).reshape(4, 10)), [(5, 20), (0, 40)], found)
    counts = [len(found) for _ in blocks]
    assert counts == [0, 1, 1, 2]
