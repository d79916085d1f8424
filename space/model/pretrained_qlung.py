"""Pretrained audio encoders, from the Hub or a folder, with every key of the checkpoint accounted for."""

import os

import torch
from transformers import ASTModel, ClapAudioModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


# By a checkpoint's model type: the encoder, and what else a checkpoint may hold, which stays behind.
_CLAP = (ClapAudioModel, ("text_model.", "text_projection.", "audio_projection.", "logit_scale_a", "logit_scale_t"))
ENCODERS = {
    "audio-spectrogram-transformer": (ASTModel, ("classifier.",)),
    "clap": _CLAP,
    "clap_audio_model": _CLAP,
}
# Whole CLAPs name the tower's keys audio_model.*: without this, Transformers finds none and makes random weights.
RENAMED = {r"^audio_model\.": ""}


def load_audio_encoder(pretrained_model_name_or_path: str, **hub) -> PreTrainedModel:
    """Load an Audio Spectrogram Transformer or CLAP's audio tower, in float32.

    Args:
        pretrained_model_name_or_path: a Hub id, or a folder with config.json and weights in Transformers' format.
        hub: `HUB_OPTIONS` of Transformers' `from_pretrained`.

    Raises:
        OSError: if the weights are neither in a folder of that name nor to be had from the Hub.
        ValueError: if they are another model's, or if a key of the encoder is missing or of another shape, or one is
            left over that belongs to none of the parts left behind.
    """
    name = pretrained_model_name_or_path
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Transformers would report what stays behind; what may not is refused below
    try:
        model_type = PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type")
        if model_type not in ENCODERS:
            raise ValueError(f"{name} is a {model_type}, not an AST or CLAP ({', '.join(ENCODERS)}).")
        encoder_class, left_behind = ENCODERS[model_type]
        encoder, info = encoder_class.from_pretrained(
            name,
            dtype=torch.float32,
            key_mapping=RENAMED,
            ignore_mismatched_sizes=True,  # refused below too
            output_loading_info=True,
            **hub,
        )
    except OSError as error:
        if os.path.isdir(name):
            raise
        raise OSError(_where_to_get(name)) from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = {
        "lacks": sorted(info["missing_keys"]),
        "has no place for": sorted(key for key in info["unexpected_keys"] if not key.startswith(left_behind)),
        "has other shapes than the file's for (key, file, encoder)": sorted(info["mismatched_keys"]),
    }
    if any(wrong.values()):
        faults = "; it ".join(f"{fault} {keys}" for fault, keys in wrong.items() if keys)
        raise ValueError(f"The weights of {name} do not fit: the encoder {faults}.")
    return encoder


def _where_to_get(name: str) -> str:
    """Say what to do about weights that are in no folder of this name."""
    if os.path.isabs(name) or name.startswith((".", "~")):
        return f"There is no folder {name}."
    folder = name.rpartition("/")[2]
    return (
        f"The weights {name!r} are no local folder and could not be downloaded. With a network: "
        f"hf download {name} --local-dir {folder}, then give the folder {folder!r} (config.json and model.safetensors) "
        "instead of the name."
    )
