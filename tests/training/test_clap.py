"""Training with CLAP's audio tower, whose batch norm keeps running statistics."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.training.sharpness import SharpnessAwareStep

from ..encoders import TINY_CLAP
from .small_training import batches, cycles, make_trainer
from .test_sharpness import started

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def clap_trainer(folder, **options):
    """`make_trainer` with a tiny CLAP on 0.5 s: the same samples, taken as 48 kHz."""
    torch.manual_seed(0)
    model = QLungForAudioClassification(QLungConfig(audio_config=TINY_CLAP))
    extractor = QLungFeatureExtractor(front_end="clap", duration=0.5)
    return make_trainer(folder, model, train=cycles(8), feature_extractor=extractor, **options)


def statistics(model) -> dict[str, torch.Tensor]:
    norm = model.qlung.encoder.audio_encoder.batch_norm
    return {name: getattr(norm, name).clone() for name in STATISTICS}


@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "looksam"])
def test_a_sharpness_aware_step_moves_the_statistics_as_a_plain_one_does(tmp_path, method):
    trainer = started(clap_trainer(tmp_path, sharpness=SharpnessAwareStep(method, rho=0.5)))
    by_hand = copy.deepcopy(trainer.model).train()
    batch = batches(trainer)[0]
    trainer.training_step(trainer.model, dict(batch))
    by_hand(batch["input_values"])
    moved, expected = statistics(trainer.model), statistics(by_hand)
    assert moved["num_batches_tracked"] == 1
    assert not torch.equal(moved["running_mean"], torch.zeros(64))
    for name in STATISTICS:
        assert torch.equal(moved[name], expected[name]), name


def test_a_saved_and_a_resumed_run_keep_the_statistics(tmp_path):
    """Four steps at once, and two more from the checkpoint of the second."""
    sharpness = {"sharpness": SharpnessAwareStep("sam", rho=0.05)}
    whole = clap_trainer(tmp_path / "whole", num_train_epochs=2, save_strategy="epoch", **sharpness)
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    for name, value in statistics(whole.model).items():
        assert torch.equal(saved[f"qlung.encoder.audio_encoder.batch_norm.{name}"], value), name
    resumed = clap_trainer(tmp_path / "whole", num_train_epochs=2, **sharpness)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert statistics(whole.model)["num_batches_tracked"] == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
