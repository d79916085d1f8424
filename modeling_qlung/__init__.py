"""QLung: respiratory-sound classification with angular margins and sharpness-aware training.

This package's top modules are what a checkpoint carries on the Hub; `training`, `inference` and `evaluation` are what a
trainer, an application and a researcher need beside them.
"""

import importlib.util
from importlib.metadata import version

if importlib.util.find_spec("torchaudio") is not None:
    # Transformers looks at package metadata alone: a torchaudio that does not load breaks its AST, Trainer, pipeline.
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"torchaudio {version('torchaudio')} does not load beside torch {version('torch')}: install the pair with "
            "pip install 'torch==2.11.0' 'torchaudio==2.11.0', or pip uninstall torchaudio, which only training needs."
        ) from error

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification

from .configuration_qlung import QLungConfig
from .feature_extraction_qlung import QLungFeatureExtractor
from .modeling_qlung import QLungForAudioClassification, QLungModel

AutoConfig.register("qlung", QLungConfig, exist_ok=True)
AutoFeatureExtractor.register(QLungConfig, QLungFeatureExtractor, exist_ok=True)
AutoModel.register(QLungConfig, QLungModel, exist_ok=True)
AutoModelForAudioClassification.register(QLungConfig, QLungForAudioClassification, exist_ok=True)

__all__ = ["QLungConfig", "QLungFeatureExtractor", "QLungForAudioClassification", "QLungModel"]
__version__ = "0.1.0"
