"""Reading, resampling and classifying recordings outside of training."""

from .analysis import Analysis, Span
from .analyzer import LungSoundAnalyzer
from .attention import attention_map
from .audio import measure_level, open_audio, read_audio, resample, resample_blocks
from .operating_points import OperatingPoints
from .precision import fastest_dtype

__all__ = [
    "Analysis",
    "LungSoundAnalyzer",
    "OperatingPoints",
    "Span",
    "attention_map",
    "fastest_dtype",
    "measure_level",
    "open_audio",
    "read_audio",
    "resample",
    "resample_blocks",
]
