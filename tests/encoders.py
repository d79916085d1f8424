"""Encoders of every part that the real ones have, and narrow."""

from typing import Any

TINY_AST: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TINY_CLAP: dict[str, Any] = {
    "model_type": "clap_audio_model",
    "patch_embeds_hidden_size": 8,
    "hidden_size": 64,
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}
