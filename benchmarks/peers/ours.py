"""The training scripts of this project, unmodified."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.peers.tasks import LEARNING_RATE, PROMPTS, RANK, Task
from benchmarks.plan import words
from diffusers_align.plan import command
from diffusers_align.training import Run

NEVER = str(10**6)


def flags(task: Task) -> dict[str, str]:
    """Those of the task's script."""
    samples = str(task.batches * task.batch)
    common = {
        "pretrained_model_name_or_path": task.model, "output_dir": "ours", "rank": str(RANK), "lora_alpha": str(RANK), "learning_rate": str(LEARNING_RATE),
        "num_epochs": NEVER, "checkpointing_epochs": NEVER, "validation_epochs": NEVER, "train_batch_size": str(task.batch), "allow_no_signal": "",
        "num_eval_samples": "2", "num_validation_images": "1",
    }  # fmt: skip
    if task.method == "dpo":
        return common | {"dataset_name": "pairs.jsonl", "num_inference_steps": "2", "num_samples_per_epoch": samples, "gradient_accumulation_steps": "1"}
    common |= {"prompts": "prompts.txt", "reward": "reward.py:brightness"}
    common |= {"num_inference_steps": str(task.steps), "guidance_scale": str(task.guidance)}
    if task.method == "flow_grpo":
        groups = {"num_prompts_per_epoch": str(task.batches * task.batch // 4), "group_size": "4", "kl_weight": "0.01"}
        return common | groups | {"call_kwargs": '{"max_sequence_length": 1}', "gradient_accumulation_steps": "1"}
    if task.method == "alignprop":
        cut = -(-50 * (task.steps - task.grad_steps) // task.steps)
        fixed = {"truncation_schedule": "fixed", "truncation_step": str(cut), "gradient_accumulation_steps": str(task.batches)}
        return common | fixed | {"num_samples_per_epoch": samples}
    return common | {"num_samples_per_epoch": samples, "gradient_accumulation_steps": "1"}


def train(worker, task: Task, path) -> None:
    original = Run.epochs

    def epochs(run: Run) -> Iterator[int]:
        def waited(seconds: float) -> None:  # the curve is drawn every so many seconds of the run, and waiting is none
            if run.curve_drawn is not None:
                run.curve_drawn += seconds

        worker.waited = waited
        for epoch in original(run):
            worker.turn()
            yield epoch

    Run.epochs = epochs
    with open("prompts.txt", "w") as file:
        file.write("\n".join(PROMPTS))
    command.module_of(f"train_{task.method}").main(words(flags(task)))
