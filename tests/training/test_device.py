"""What keeps a GPU busy: nothing waits for it, batches are made elsewhere, compiled code computes the same."""

import contextlib
import os
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from modeling_qlung.training.arguments import QLungTrainingArguments
from modeling_qlung.training.augmentation import SpecAugment, WaveformAugment
from modeling_qlung.training.losses import QLungLoss
from modeling_qlung.training.objectives import DeviceContrast, PatchMix, PatchMixContrast, Supervised

from .small_training import cycles, make_trainer

OBJECTIVES = [Supervised, PatchMix, lambda: PatchMixContrast(contrast_negatives="other_class"), DeviceContrast]
NAMES = ["supervised", "patch_mix", "patch_mix_contrast", "device_contrast"]


class NoCopies(TorchDispatchMode):
    """Lets no operation take tensors of two devices, or bring one from a device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        copies = "copy" in func.name()  # elsewhere a number that Python wrapped into a tensor is no copy
        devices = {tensor.device.type for tensor in tensors if tensor.ndim or copies}
        assert len(devices) < 2, f"{func} waits: it has tensors on {' and '.join(sorted(devices))}"
        return result


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_a_step_never_waits_for_its_device(tmp_path, monkeypatch, objective):
    """On the meta device, which has no values to wait for: reading one raises, and so does a copy other than `send`."""
    sent = []

    def send(values, device):
        sent.append(values)
        return torch.empty(values.shape, dtype=values.dtype, device=device)

    monkeypatch.setattr("modeling_qlung.training.augmentation.send", send)
    monkeypatch.setattr("modeling_qlung.training.objectives.send", send)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # unknown to meta
    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda self, inputs: dict(inputs))
    trainer = make_trainer(
        tmp_path,
        loss=QLungLoss([8, 8, 8, 8]),
        objective=objective(),
        spec_augment=SpecAugment(),
        waveform_augment=WaveformAugment(),
    )
    trainer.model.to("meta").train()
    trainer.loss.to("meta")
    batch = {
        "clips": torch.empty(4, 8000, device="meta"),
        "labels": torch.empty(4, dtype=torch.long, device="meta"),
        "quality": torch.empty(4, device="meta"),
        "device": torch.empty(4, dtype=torch.long, device="meta"),
    }
    trainer.feature_extractor.extract_features(batch["clips"])  # makes its window and filters, once
    with NoCopies():
        inputs = trainer._prepare_inputs(batch)
        trainer.compute_loss(trainer.model, inputs).backward()
    assert len(sent) >= 4
    assert all(values.device.type == "cpu" for values in sent)


def test_that_a_wait_is_seen():
    on_device, on_cpu = torch.empty(3, device="meta"), torch.arange(3)
    with pytest.raises(AssertionError, match="waits"), NoCopies():
        on_cpu.to("meta")
    with pytest.raises(AssertionError, match="waits"), NoCopies():
        on_device[on_cpu]
    with pytest.raises((RuntimeError, NotImplementedError)), NoCopies():
        on_device[on_device > 0].sum().item()
    with NoCopies():
        on_device + 2


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_loader_processes_change_nothing(tmp_path):
    """Rows from a memory-mapped file; masks and dropout are drawn beside the loader, in the same order."""
    cycles(24).with_format(None).save_to_disk(tmp_path / "rows")
    rows = type(cycles(1)).load_from_disk(tmp_path / "rows")
    rows = rows.with_format("numpy", columns=["waveform"], output_all_columns=True)
    histories = [
        losses(
            make_trainer(
                tmp_path,
                train=rows,
                spec_augment=SpecAugment(1, 40, 1, 20),
                dataloader_num_workers=workers,
                logging_strategy="steps",
                logging_steps=1,
                num_train_epochs=2,
            )
        )
        for workers in (0, 2)
    ]
    assert len(histories[0]) == 12
    assert histories[0] == histories[1]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=NAMES[:3])
def test_torch_compile_changes_nothing(tmp_path, objective):
    """With the last batch smaller than the others. The backend is the one without a compiler of C++ behind it."""
    histories = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        with mock.patch.dict(os.environ):  # where Transformers leaves the backend
            trainer = make_trainer(
                tmp_path,
                train=cycles(10),
                objective=objective(),
                spec_augment=SpecAugment(1, 40, 1, 20),
                logging_strategy="steps",
                logging_steps=1,
                num_train_epochs=2,
                **options,
            )
            histories.append(losses(trainer))
    assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


def test_batches_are_made_beside_a_gpu(tmp_path, monkeypatch):
    assert QLungTrainingArguments(output_dir=str(tmp_path)).dataloader_num_workers == (
        2 if torch.accelerator.is_available() else 0
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert QLungTrainingArguments(output_dir=str(tmp_path)).dataloader_num_workers == 2
    assert QLungTrainingArguments(output_dir=str(tmp_path), use_cpu=True).dataloader_num_workers == 0
    assert QLungTrainingArguments(output_dir=str(tmp_path), dataloader_num_workers=0).dataloader_num_workers == 0
    on_cpu = QLungTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert not on_cpu.accelerator_config.non_blocking
