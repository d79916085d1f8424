"""Pieces of a recording that comes block by block: windows, parts, cycles; and one curve from overlapping windows."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def sliding_windows(blocks: Iterable[np.ndarray], length: int, hop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut windows, each `hop` after the one before; the last one ends where the recording does.

    Args:
        blocks: consecutive samples, each of shape (n,).
        length: of a window, in samples; a shorter recording is one window.
        hop: in samples, at most `length`.

    Yields:
        A window's first sample, and its samples (length,), as long as those last.
    """
    start, kept, found = 0, np.empty(0, dtype=np.float32), False
    for block in blocks:
        kept = np.concatenate([kept, block])
        ahead = hop if found else 0  # `kept` starts at the window last given: the last of all may overlap it
        while len(kept) >= ahead + length:
            start, kept, found = start + ahead, kept[ahead:], True
            yield start, kept[:length]
            ahead = hop
    beyond = len(kept) - length
    if not found and len(kept):
        yield 0, kept
    elif found and beyond > 0:
        yield start + beyond, kept[beyond:]


def consecutive_parts(blocks: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Cut parts of `length` samples one after the other, the last one of up to twice as many.

    Args:
        blocks: consecutive samples, each of shape (n,).
        length: in samples; a recording of less than twice as many is one part.
    """
    kept = np.empty(0, dtype=np.float32)
    for block in blocks:
        kept = np.concatenate([kept, block])
        while len(kept) >= 2 * length:
            yield kept[:length]
            kept = kept[length:]
    if len(kept):
        yield kept


def tap_sections(
    blocks: Iterable[np.ndarray], sections: Sequence[tuple[int, int]], found: list[tuple[int, np.ndarray]]
) -> Iterator[np.ndarray]:
    """Pass blocks on, and collect sections of them, in any order, overlapping or not.

    Args:
        blocks: consecutive samples, each of shape (n,).
        sections: first sample and the one after the last; what lies beyond the recording's end is left out.
        found: gets a section's index and its samples as soon as the last of them is there; one that holds none never.
    """
    waiting: dict[int, list[np.ndarray]] = {index: [] for index in range(len(sections))}
    position = 0
    for block in blocks:
        following = position + len(block)
        for index in list(waiting):
            first, last = sections[index]
            if first < following:
                waiting[index].append(block[max(0, first - position) : last - position])
            if last <= following:
                found.append((index, np.concatenate(waiting.pop(index))))
        position = following
        yield block
    found.extend((index, np.concatenate(pieces)) for index, pieces in waiting.items() if pieces)


def merge_windows(
    starts: Sequence[int], lengths: Sequence[int], values: np.ndarray, hop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Average overlapping windows over steps of `hop` samples.

    Args:
        starts: first sample of each window of [`sliding_windows`].
        lengths: of each, in samples.
        values: one row each, (windows, columns).
        hop: of the windows, in samples.

    Returns:
        Edges of the steps (steps, 2) in samples, from 0 to the recording's end, where the last one lasts from half to
        one and a half of a hop, if windows are that long; and for each the mean of the rows of the windows that cover
        all of it, (steps, columns).
    """
    first = np.asarray(starts)
    last = first + np.asarray(lengths)
    shortest = hop // 2 if 2 * lengths[0] >= 3 * hop else 1
    edges = np.append(np.arange(0, max(last[-1] + 1 - shortest, 1), hop), last[-1])
    edges = np.stack([edges[:-1], edges[1:]], axis=1)
    begin = np.searchsorted(last, edges[:, 1])  # windows are in order: those that cover a step stand together
    end = np.searchsorted(first, edges[:, 0], side="right")
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=np.float64)])
    return edges, (sums[end] - sums[begin]) / (end - begin)[:, None]
