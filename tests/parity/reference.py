"""Inputs, weights and digests by rule: the published code was run on the same, so that fixtures hold its outputs alone.

Numbers come from the raw stream of PCG64, which numpy keeps from version to version, seeded by a name.
"""

import functools
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FIXTURES = Path(__file__).parent / "fixtures"
PROJECTIONS = 16


def raw(name: str, size: int) -> NDArray:
    """Random 64-bit integers, (size,)."""
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(size)


def uniform(name: str, *shape: int) -> NDArray:
    """Random float32 values in [-1, 1)."""
    values = (raw(name, int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53
    return (values * 2 - 1).reshape(shape).astype(np.float32)


def ast_weight(name: str, *shape: int) -> NDArray:
    """A parameter of the published AST, by its name there: positions large, so that a wrong order shows."""
    value = uniform(name, *shape)
    if "pos_embed" in name or "token" in name:
        return 0.5 * value
    if "norm" in name:
        return 0.1 * value + (1 if name.endswith("weight") else 0)
    return 0.08 * value


def sounds() -> list[NDArray]:
    """Two waveforms at 16 kHz, of 3.125 s (padded to 8 s) and 9 s (cut): breath-like noise with short tones."""
    time = np.arange(9 * 16000) / 16000
    noise = 0.1 * uniform("breath", len(time)) * np.sin(np.pi * time / 3) ** 2
    tones = 0.05 * np.sin(2 * np.pi * 400 * time) * (time % 1 < 0.3)
    sound = (noise + tones).astype(np.float32)
    return [sound[:50000], sound]


def digest(features: NDArray, recording_id: str, cycle_index: int) -> tuple[NDArray, NDArray]:
    """What is kept of one cycle's features (798, 128).

    Returns:
        64 of its values, each cycle's at other places (8 of them within the first four frames, 8 within the last
        eight, where fades act), and its projections on `PROJECTIONS` random unit vectors.
    """
    draws = raw(f"{recording_id} {cycle_index}", 64).astype(np.int64) & 0xFFFFFFFF
    frames, bands = draws % len(features), (draws >> 10) % features.shape[1]
    frames[:8] %= 4
    frames[8:16] = len(features) - 1 - frames[8:16] % 8
    projections = _signs(features.size) @ features.ravel() / np.sqrt(features.size)
    return features[frames, bands], projections


@functools.cache
def _signs(size: int) -> NDArray:
    """Random signs, (PROJECTIONS, size)."""
    bits = raw("unit vectors", size)
    signs = np.stack([(bits >> np.uint64(k)) & np.uint64(1) for k in range(PROJECTIONS)])
    return signs.astype(np.float32) * 2 - 1
