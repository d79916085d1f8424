"""Reading, resampling and classifying recordings outside of training."""

from .audio import read_audio, resample
from .precision import fastest_dtype

__all__ = ["fastest_dtype", "read_audio", "resample"]
