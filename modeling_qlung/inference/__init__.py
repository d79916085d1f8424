"""Reading, resampling and classifying recordings outside of training."""

from .audio import read_audio, resample

__all__ = ["read_audio", "resample"]
