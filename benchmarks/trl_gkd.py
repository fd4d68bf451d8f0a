"""Seconds per step of TRL's GKDTrainer with nothing on-policy (lmbda 0) and KL(teacher || student) (beta 0).

Runs in an environment of its own, which `make bench-train` builds; `benchmarks/train.py` starts it with

    python benchmarks/trl_gkd.py TEACHER STUDENT BLOCKS.npy STEPS BATCH bf16|fp32 [embedding head]

TEACHER and STUDENT are model folders, BLOCKS tokens (number of blocks, T), BATCH blocks a step; what to freeze is last.
The last line is a JSON object: median seconds per step after two for warm-up, and the peak of resident memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)

WARM_UP = 2


def main(
    teacher: str, student: str, blocks: str, steps: int, batch_size: int, precision: str, frozen: set[str]
) -> None:
    """Train `steps` steps after the warm-up and print what they took."""
    import transformers
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from distill.student import LSTMForCausalLM

    torch.set_flush_denormal(True)
    tokens_NT = np.load(blocks)
    model = LSTMForCausalLM.from_pretrained(student)
    if "embedding" in frozen:
        model.get_input_embeddings().requires_grad_(False)
    if "head" in frozen:
        model.get_output_embeddings().requires_grad_(False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen_teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype)
    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_BT = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT.clone()}

    rows = [{"input_ids": tokens_NT[n % len(tokens_NT)].tolist()} for n in range((WARM_UP + steps + 1) * batch_size)]
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=model,
            teacher_model=frozen_teacher,
            args=GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                temperature=1.0,
                per_device_train_batch_size=batch_size,
                max_steps=WARM_UP + steps + 1,
                learning_rate=2e-3,
                bf16=precision == "bf16",
                use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=False,  # our student has none to offer; it would cost time
                report_to="none",
                save_strategy="no",
                logging_steps=10_000,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=collate,
            callbacks=[Watch()],
            processing_class=AutoTokenizer.from_pretrained(teacher),
        )
        reset_peak()
        trainer.train()
    seconds = [after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]
    report = {
        "seconds_per_step": statistics.median(seconds),
        "steps": len(seconds),
        "loss": trainer.state.log_history[-1].get("train_loss"),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_rss_mib": peak_mib(),
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    print(json.dumps(report), flush=True)


def reset_peak() -> None:
    """Have the kernel count the peak of resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak of resident memory since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    teacher, student, blocks, steps, batch_size, precision, *frozen = sys.argv[1:]
    main(teacher, student, blocks, int(steps), int(batch_size), precision, set(frozen))
