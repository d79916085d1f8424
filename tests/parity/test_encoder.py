"""From waveform to pooled embedding: equal to the published AST with the same weights, on either position grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ASTConfig, ASTModel

from modeling_qlung import QLungFeatureExtractor, QLungModel
from modeling_qlung.modeling_qlung import cut_position_grid
from modeling_qlung.training.as_published import scramble_position_grid

from .reference import FIXTURES, ast_weight, sounds

LAYERS, WIDTH = 3, 768
GRIDS = {"published": scramble_position_grid, "right": cut_position_grid}


def published_name(name: str) -> str:
    """The name in the published checkpoint of a parameter of Transformers' AST (other than query, key and value)."""
    renamed = {
        "embeddings.cls_token": "v.cls_token",
        "embeddings.distillation_token": "v.dist_token",
        "embeddings.position_embeddings": "v.pos_embed",
        "embeddings.patch_embeddings.projection": "v.patch_embed.proj",
        "layers.": "v.blocks.",
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }
    for ours, theirs in renamed.items():
        name = name.replace(ours, theirs)
    return name.replace("layernorm.", "v.norm.")


def published_parameter(name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter's values by the rule, which goes by the published names; there one matrix gives q, k and v."""
    for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        if projection in name:
            joint = published_name(name).replace(f"attention.{projection}", "attn.qkv")
            return torch.from_numpy(ast_weight(joint, 3 * shape[0], *shape[1:])).chunk(3)[part]
    return torch.from_numpy(ast_weight(published_name(name), *shape))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with an AST for 1024 frames: base's width, three layers, weights by the rule."""
    model = ASTModel(ASTConfig(num_hidden_layers=LAYERS))
    model.load_state_dict({name: published_parameter(name, v.shape) for name, v in model.state_dict().items()})
    folder = tmp_path_factory.mktemp("ast")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "ast_embeddings.npz") as values:
        return dict(values)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_embedding_of_a_sound_is_that_of_the_published_code(grid, checkpoint, expected):
    model = QLungModel.from_audio_encoder(str(checkpoint), duration=8.0, position_grid=GRIDS[grid]).eval()
    features = QLungFeatureExtractor()(sounds(), sampling_rate=16000, return_tensors="pt").input_values
    assert features.shape == (2, 798, 128)
    with torch.no_grad():
        embedding = model(features).pooler_output.numpy()
    difference = np.abs(embedding - expected[grid]).max()
    print(f"\nembedding, {grid} grid: largest difference from the published code {difference:.1e}")
    assert difference < 1e-4
    other = next(name for name in GRIDS if name != grid)
    assert np.abs(embedding - expected[other]).max() > 0.1  # the bound can tell the grids apart


@pytest.mark.parametrize("grid", GRIDS)
def test_every_eighth_of_the_position_embeddings_is_that_of_the_published_code(grid, expected):
    positions = torch.from_numpy(ast_weight("v.pos_embed", 1, 2 + 12 * 101, WIDTH))
    made = GRIDS[grid](positions, ASTConfig(), ASTConfig(max_length=798))[0, :, ::96].numpy()
    difference = np.abs(made - expected[f"{grid}_positions"]).max()
    print(f"\nposition embeddings, {grid} grid: largest difference from the published code {difference:.1e}")
    assert made.shape == (2 + 12 * 79, 8)
    assert difference < 1e-6


@pytest.mark.parametrize("frames", [798, 128, 388, 400, 1014])
def test_the_default_grid_follows_the_rule_of_ast(frames):
    """Gong et al. 2021: of 101 columns, those from 50 - int(t / 2) on, for t shorter than 101; without stretching."""
    columns = (frames - 16) // 10 + 1
    grid = np.arange(12 * 101, dtype=np.float32).reshape(12, 101)
    first = 50 - int(columns / 2)
    rule = np.concatenate([[-1, -2], grid[:, first : first + columns].ravel()])
    positions = torch.from_numpy(np.concatenate([[-1, -2], grid.ravel()]).astype(np.float32))[None, :, None]
    made = cut_position_grid(positions, ASTConfig(), ASTConfig(max_length=frames))
    assert np.array_equal(made[0, :, 0].numpy(), rule)


@pytest.mark.parametrize("frames", [1038, 1538])
def test_a_longer_grid_is_stretched_in_time_by_the_rule_of_ast(frames):
    """Linear between the centres of 101 columns, which cover the same span as the wanted ones do."""
    columns = (frames - 16) // 10 + 1
    grid = np.random.default_rng(0).standard_normal((12, 101)).astype(np.float32)
    centres = (np.arange(columns) + 0.5) * 101 / columns - 0.5
    rule = np.stack([np.interp(centres, np.arange(101), band) for band in grid])
    positions = torch.from_numpy(np.concatenate([[-1, -2], grid.ravel()]).astype(np.float32))[None, :, None]
    made = cut_position_grid(positions, ASTConfig(), ASTConfig(max_length=frames))[0, :, 0].numpy()
    np.testing.assert_array_equal(made[:2], [-1, -2])
    np.testing.assert_allclose(made[2:].reshape(12, columns), rule, atol=1e-4)


def test_the_published_grid_is_refused_where_the_published_code_has_none():
    with pytest.raises(ValueError, match="Leave position_grid out, or ask for a longer duration"):
        scramble_position_grid(torch.zeros(1, 2 + 12 * 101, 4), ASTConfig(), ASTConfig(max_length=128))
