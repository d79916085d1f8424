"""Pretrained encoders: checkpoints of the real ones' shape, key by key."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    ClapAudioConfig,
    ClapAudioModel,
    ClapAudioModelWithProjection,
    ClapConfig,
    ClapModel,
    PreTrainedModel,
)
from transformers.utils import logging

from modeling_qlung import QLungConfig, QLungForAudioClassification, QLungModel
from modeling_qlung.modeling_qlung import cut_position_grid
from modeling_qlung.pretrained_qlung import load_audio_encoder

from .encoders import TINY_AST, TINY_CLAP

TINY_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 9,
}


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Random everywhere: a value left at its initial one would not be noticed."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            torch.nn.init.uniform_(value, 0.1, 1.0)
    return model


def tiny_clap_tower() -> ClapAudioConfig:
    return ClapAudioConfig(**TINY_CLAP)


# What Transformers can write that holds an encoder, and the encoder's prefix in its state.
CHECKPOINTS = {
    "AST with a classifier": (
        lambda: ASTForAudioClassification(ASTConfig(**TINY_AST, num_labels=527)),
        "audio_spectrogram_transformer.",
    ),
    "AST alone": (lambda: ASTModel(ASTConfig(**TINY_AST)), ""),
    "whole CLAP": (lambda: ClapModel(ClapConfig(text_config=TINY_TEXT, audio_config=TINY_CLAP)), "audio_model."),
    "CLAP's tower with its projection": (lambda: ClapAudioModelWithProjection(tiny_clap_tower()), "audio_model."),
    "CLAP's tower alone": (lambda: ClapAudioModel(tiny_clap_tower()), ""),
}


@pytest.fixture(scope="session", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    """A folder written by Transformers, and the encoder's state in it."""
    make, prefix = CHECKPOINTS[request.param]
    torch.manual_seed(0)
    model = randomized(make())
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    state = {key.removeprefix(prefix): value for key, value in model.state_dict().items() if key.startswith(prefix)}
    return folder, state


@pytest.fixture(scope="session")
def pretrained_ast(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ast")
    randomized(ASTForAudioClassification(ASTConfig(**TINY_AST, num_labels=527))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pretrained_clap(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clap")
    config = ClapConfig(text_config=TINY_TEXT, audio_config=TINY_CLAP)
    randomized(ClapModel(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cls", [QLungModel, QLungForAudioClassification])
def test_every_value_of_the_encoder_arrives(cls, checkpoint):
    folder, state = checkpoint
    options = {"num_frames": 1024} if "embeddings.cls_token" in state else {}
    model = cls.from_audio_encoder(str(folder), **options)
    loaded = model.base_model.encoder.state_dict()
    assert loaded.keys() <= state.keys()
    assert not {key for key in state.keys() - loaded.keys() if not key.startswith("classifier.")}
    for key, value in loaded.items():
        assert torch.equal(value, state[key]), key
    assert model.config.audio_config.name_or_path == ""


def test_claps_embedding_is_that_of_the_whole_clap(pretrained_clap):
    model = QLungModel.from_audio_encoder(str(pretrained_clap)).eval()
    whole = ClapModel.from_pretrained(pretrained_clap).eval()
    features = 10 * torch.randn(2, 1001, 64) - 50
    with torch.no_grad():
        expected = whole.audio_model(input_features=features[:, None]).pooler_output
        assert torch.equal(model(features).pooler_output, expected)


# ---- The real checkpoints' own keys and shapes ----

AST_RENAMED = {
    "audio_spectrogram_transformer.": "",
    "encoder.layer.": "layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}


def ast_name(key: str) -> str:
    for old, new in AST_RENAMED.items():
        key = key.replace(old, new)
    return key


def write_real(folder: Path, name: str, prefix: str, config: dict) -> dict[str, torch.Tensor]:
    """Write a half-precision checkpoint under the keys of the list; shapes are true within the encoder."""
    lines = (Path(__file__).parent / "checkpoint_keys" / f"{name}.txt").read_text().splitlines()[1:]
    tensors = {}
    for index, line in enumerate(lines):
        key, shape = line.split()
        size = [] if shape == "scalar" else [int(length) for length in shape.split("x")]
        if not key.startswith(prefix):
            size = [1]
        ramp = torch.arange(math.prod(size)) % 251 + index  # exact in float16, and every key's own
        integer = key.endswith(("_index", "_tracked", "_ids"))
        tensors[key] = ramp.reshape(size).to(torch.int64 if integer else torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return {key: value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "prefix", "config", "rename", "number"),
    [
        ("ast-audioset", "audio_spectrogram_transformer.", {"num_labels": 527}, ast_name, 199),
        ("clap-htsat-unfused", "audio_model.", {}, lambda key: key.removeprefix("audio_model."), 236),
    ],
)
def test_the_real_keys_are_all_found_and_the_weights_are_float32(tmp_path, name, prefix, config, rename, number):
    model_type = "clap" if name.startswith("clap") else "audio-spectrogram-transformer"
    written = write_real(tmp_path, name, prefix, {"model_type": model_type, "dtype": "float16", **config})
    assert len(written) == number
    encoder = load_audio_encoder(str(tmp_path))
    assert encoder.dtype == torch.float32
    loaded = encoder.state_dict()
    assert loaded.keys() == {rename(key) for key in written}
    for key, value in written.items():
        assert torch.equal(loaded[rename(key)], value.to(loaded[rename(key)].dtype)), key


def test_the_real_ast_at_full_length_gives_its_own_embedding(tmp_path):
    """AST base, 12 layers of 768, random weights: saved by Transformers, read by us, same numbers."""
    torch.manual_seed(0)
    original = ASTModel(ASTConfig()).eval()
    torch.nn.init.normal_(original.embeddings.position_embeddings, std=0.02)
    original.save_pretrained(tmp_path)
    model = QLungModel.from_audio_encoder(str(tmp_path), num_frames=1024).eval()
    features = torch.randn(1, 1024, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(features).pooler_output, original(features).pooler_output)


# ---- What is wrong with a checkpoint is an error that names it ----


def spoil(source: Path, target: Path, change) -> str:
    """Copy a checkpoint with its tensors changed."""
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return str(target)


def spoiled_keys(kind: str) -> tuple[str, str]:
    """A tensor of the encoder: its key in the file, and in the model."""
    if kind == "ast":
        return (
            "audio_spectrogram_transformer.encoder.layer.0.layernorm_before.weight",
            "layers.0.layernorm_before.weight",
        )
    return "audio_model.audio_encoder.batch_norm.running_var", "audio_encoder.batch_norm.running_var"


@pytest.fixture(params=["ast", "clap"])
def source(request, pretrained_ast, pretrained_clap):
    return request.param, {"ast": pretrained_ast, "clap": pretrained_clap}[request.param]


def test_a_dropped_key_is_refused(source, tmp_path):
    kind, folder = source
    in_file, in_model = spoiled_keys(kind)
    path = spoil(folder, tmp_path, lambda weights: weights.pop(in_file))
    with pytest.raises(ValueError, match=rf"of {path} do not fit: the encoder lacks \['{in_model}'\]\."):
        QLungModel.from_audio_encoder(path)


@pytest.mark.parametrize("name", ["{prefix}extra.weight", "adapter.weight", "classifiers", "text_models"])
def test_a_key_too_many_is_refused(source, tmp_path, name):
    kind, folder = source
    added = name.format(prefix="audio_spectrogram_transformer." if kind == "ast" else "audio_model.audio_encoder.")
    path = spoil(folder, tmp_path, lambda weights: weights.update({added: torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"the encoder has no place for \['.*" + added.rpartition(".")[2] + r"'\]\."):
        QLungModel.from_audio_encoder(path)


def test_another_shape_is_refused(source, tmp_path):
    kind, folder = source
    in_file, in_model = spoiled_keys(kind)
    size = {"ast": 16, "clap": 64}[kind]
    path = spoil(folder, tmp_path, lambda weights: weights.update({in_file: torch.zeros(7)}))
    with pytest.raises(ValueError, match=rf"\('{in_model}', .*\[7\].*\[{size}\]"):
        QLungModel.from_audio_encoder(path)


def test_transformers_is_as_talkative_as_before(source, tmp_path):
    kind, folder = source
    before = logging.get_verbosity()
    QLungModel.from_audio_encoder(str(folder))
    with pytest.raises(ValueError, match="lacks"):
        QLungModel.from_audio_encoder(spoil(folder, tmp_path, lambda weights: weights.pop(spoiled_keys(kind)[0])))
    assert logging.get_verbosity() == before


def test_other_models_and_absent_weights_are_named(tmp_path):
    with pytest.raises(OSError, match="hf download nobody/no-such-clap --local-dir no-such-clap, then give the folder"):
        QLungModel.from_audio_encoder("nobody/no-such-clap")
    with pytest.raises(OSError, match=f"There is no folder {tmp_path}/nothing"):
        QLungModel.from_audio_encoder(f"{tmp_path}/nothing")
    QLungModel(QLungConfig(audio_config={**TINY_AST, "max_length": 98})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a qlung, not an AST or CLAP"):
        QLungModel.from_audio_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "clap"}')
    with pytest.raises(OSError, match=r"model\.safetensors"):
        QLungModel.from_audio_encoder(str(tmp_path))


def test_a_clap_with_feature_fusion_and_too_long_an_input_are_refused(pretrained_clap, tmp_path):
    fused = ClapAudioConfig(**{**TINY_CLAP, "enable_fusion": True, "fusion_type": "channel_map"})
    ClapAudioModel(fused).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="enable_fusion=True"):
        QLungModel.from_audio_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="1501 frames and the encoder takes at most 1024"):
        QLungModel.from_audio_encoder(str(pretrained_clap), num_frames=1501)


# ---- AST's position grid ----


def grid_number(frequency: int, time: int, times: int) -> int:
    """Index among AST's tokens: two special ones, then each frequency's row of times."""
    return 2 + frequency * times + time


@pytest.mark.parametrize("cls", [QLungModel, QLungForAudioClassification])
def test_from_audio_encoder_cuts_the_middle_79_of_101_columns(cls, pretrained_ast):
    model = cls.from_audio_encoder(str(pretrained_ast), duration=8.0, pooling="mean")
    assert model.config.pooling == "mean"
    assert model.config.audio_config.max_length == 798
    encoder, original = model.base_model.encoder, ASTModel.from_pretrained(pretrained_ast)
    positions, before = (e.embeddings.position_embeddings[0] for e in (encoder, original))
    assert positions.shape == (2 + 12 * 79, 16)
    assert before.shape == (2 + 12 * 101, 16)
    assert torch.equal(positions[:2], before[:2])
    for frequency in range(12):
        for time in range(79):
            cut = positions[grid_number(frequency, time, 79)]
            assert torch.equal(cut, before[grid_number(frequency, 11 + time, 101)])
    for name, value in original.state_dict().items():
        if "position_embeddings" not in name:
            assert torch.equal(encoder.state_dict()[name], value), name


def test_another_rule_may_cut_the_grid(pretrained_ast):
    def constant(positions, source, target):
        return torch.full_like(cut_position_grid(positions, source, target), target.max_length)

    model = QLungModel.from_audio_encoder(str(pretrained_ast), duration=1.0, position_grid=constant)
    assert (model.encoder.embeddings.position_embeddings == 98).all()


def test_a_shorter_input_gets_the_middle_of_the_middle(pretrained_ast):
    """Cut from 101 columns to 79, and from those to 19 at 2 s: as if cut from 101 to 19."""
    model = QLungModel.from_audio_encoder(str(pretrained_ast), num_frames=798, input_frames=[198, 398, 798]).eval()
    for frames in (198, 398):
        short = QLungModel.from_audio_encoder(str(pretrained_ast), num_frames=frames).eval()
        features = torch.randn(1, frames, 128)
        assert torch.equal(model(features).pooler_output, short(features).pooler_output)
