"""What a sharpness-aware step costs in time and memory, against a plain step of the same Trainer.

    python -m tests.benchmarks.sharpness

With AST base in bfloat16 where there is a GPU, otherwise with a small AST in float32. A step is its passes, the
optimiser's step (AdamW) and the zeroing of gradients; LookSAM's is the mean of k = 5.
"""

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from modeling_qlung import QLungConfig, QLungFeatureExtractor, QLungForAudioClassification
from modeling_qlung.training.sharpness import METHODS, SharpnessAwareStep
from modeling_qlung.training.trainer import QLungTrainer
from tests.training.small_training import make_trainer

from .timing import machine, measure, print_table, synchronize

SMALL = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
INTERVAL = 5


class Steps:
    """Steps of one method over one batch of random features: each takes its model and optimiser further."""

    def __init__(self, trainer: QLungTrainer, batch_size: int):
        self.trainer = trainer
        trainer.state.max_steps = 1_000_000
        trainer.create_optimizer_and_scheduler(trainer.state.max_steps)
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        shape = (batch_size, trainer.feature_extractor.max_length, 128)
        labels, quality = torch.arange(batch_size) % 4, torch.full((batch_size,), 0.5)
        batch = {"input_values": torch.randn(shape), "labels": labels, "quality": quality}
        self.batch = {name: value.to(trainer.args.device) for name, value in batch.items()}

    def passes(self, micro_batches: int = 1) -> None:
        """Leave the gradients of one optimiser step in `.grad`."""
        self.trainer.current_gradient_accumulation_steps = micro_batches
        for index in range(micro_batches):
            self.trainer.accelerator.gradient_state._set_sync_gradients(index == micro_batches - 1)
            self.trainer.training_step(self.model, dict(self.batch))

    def update(self) -> None:
        """Take the optimiser's step."""
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.trainer.state.global_step += 1

    def run(self, number: int = 1) -> None:
        """Take whole steps."""
        for _ in range(number):
            self.passes()
            self.update()

    def peak(self, micro_batches: int = 1) -> int:
        """Most bytes that the passes hold at once beyond the model and the optimiser, over k steps."""
        peaks = []
        for _ in range(2 * INTERVAL):
            kept = self.kept()
            peaks.append(kept + _peak_bytes(lambda: self.passes(micro_batches)))
            self.update()
        return max(peaks[INTERVAL:])  # the profiler sees no end of what it has not seen begin

    def kept(self) -> int:
        """Bytes that the method holds between steps, LookSAM's direction; no reference stays that would hold them."""
        direction = self.trainer.sharpness.state_dict()["direction"] if self.trainer.sharpness else None
        return 0 if direction is None else direction.nbytes

    def synchronizations(self) -> str:
        """How often the passes of a step wait for the GPU; nothing on a CPU."""
        if self.trainer.args.device.type != "cuda":
            return "–"
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.passes()
        torch.cuda.set_sync_debug_mode("default")
        self.update()
        return str(sum("synchronizing" in str(warning.message) for warning in caught))


def _peak_bytes(work) -> int:
    """Most bytes allocated at once while it runs, beyond those before."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def build(
    method: str, encoder: dict, duration: float, batch_size: int, folder: Path, bf16: bool = False, use_cpu: bool = True
) -> Steps:
    """Make the Trainer of one method; `plain` is none."""
    torch.manual_seed(0)
    extractor = QLungFeatureExtractor(duration=duration)
    model = QLungForAudioClassification(QLungConfig(audio_config={**encoder, "max_length": extractor.max_length}))
    sharpness = None if method == "plain" else SharpnessAwareStep(method, interval=INTERVAL)
    options: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-5, "bf16": bf16, "use_cpu": use_cpu}
    trainer = make_trainer(folder, model, sharpness=sharpness, feature_extractor=extractor, **options)
    return Steps(trainer, batch_size)


def copies(steps: Steps, plain: Steps, micro_batches: int = 1) -> float:
    """Memory held beyond a plain step's, in copies of the trainable parameters."""
    one = sum(p.nbytes for p in steps.trainer.model.parameters() if p.requires_grad)
    return (steps.peak(micro_batches) - plain.peak(micro_batches)) / one


def compare(title: str, repeats: int, encoder: dict, duration: float, batch_size: int, **options) -> None:
    """Print the table of one encoder."""
    methods = ["plain", *METHODS]
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: build(name, encoder, duration, batch_size, Path(folder), **options) for name in methods}
        number = {name: INTERVAL if name == "looksam" else 1 for name in methods}
        timings = measure({name: functools.partial(steps[name].run, number[name]) for name in methods}, repeats)
        # One item at a time: activations as large as the parameters could hide what is held beside them.
        lean = {name: build(name, encoder, duration, 1, Path(folder), **options) for name in methods}
        rows = []
        for name in methods:
            seconds = timings[name].median / number[name]
            memory = [f"{copies(lean[name], lean['plain'], micro_batches):.2f}" for micro_batches in (1, 2)]
            waits = steps[name].synchronizations()
            rows.append([name, f"{1e3 * seconds:.1f} ms", f"{seconds / timings['plain'].median:.2f}", *memory, waits])
    print(f"\n{title}, batch of {batch_size}; memory beyond plain in copies of the trainable parameters\n")
    print_table(["step", "time", "to plain", "memory", "with accumulation", "waits for the GPU"], rows)


def main() -> None:
    """Print the machine and its table."""
    print(machine())
    if torch.cuda.is_available():
        compare("AST base, 8 s, bfloat16", 20, {}, 8.0, 32, bf16=True, use_cpu=False)
    else:
        compare(f"AST of {SMALL['num_hidden_layers']} layers of {SMALL['hidden_size']}, 2 s, CPU", 7, SMALL, 2.0, 8)


if __name__ == "__main__":
    main()
