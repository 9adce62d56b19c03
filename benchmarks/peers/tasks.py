"""What is trained in a duel: the same model, prompts, reward, sizes and LoRA for all. No module of ours is needed to read it."""

from __future__ import annotations

from dataclasses import dataclass

PROMPTS = [f"a {color} fox" for color in ("red", "blue", "green", "white")]
LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]
RANK = 4
LEARNING_RATE = 1e-4
PIXELS = 32
REWARD = "def brightness(images, prompts, **columns):\n    return images.flatten(1).mean(1)\n"


@dataclass(frozen=True)
class Task:
    """An epoch's work.

    Attributes:
        method: ddpo, flow_grpo, alignprop or dpo.
        model: folder of the pipeline.
        folder: where a worker may write; `reward.py` and `pairs.jsonl` are there.
        batches: of an epoch.
        batch: samples, or pairs, of each.
        steps: of the solver; 0 for DPO.
        guidance: of roll-out and training, above 1: two rows a sample.
        grad_steps: of AlignProp, the last ones.
    """

    method: str
    model: str
    folder: str
    batches: int
    batch: int
    steps: int = 0
    guidance: float = 5.0
    grad_steps: int = 2

    @property
    def work(self) -> dict[str, int]:
        """Denoiser calls and rows, and optimizer steps, of an epoch."""
        calls, rows = {
            "ddpo": (2 * self.steps, 2 * self.batch),
            "flow_grpo": (self.steps + 2 * (self.steps - 1), 2 * self.batch),  # the last step has no noise; each other one is also the reference's
            "alignprop": (self.steps + self.grad_steps, 2 * self.batch),  # those with gradient once more on the way back
            "dpo": (2, 2 * self.batch),  # the model and the reference at both images
        }[self.method]
        return {"calls": self.batches * calls, "rows": self.batches * calls * rows, "steps": 1 if self.method == "alignprop" else self.batches}


# Of each method: the embedded model, its sizes, and those for a denoiser of 40 to 65 million weights.
SIZES = {
    "ddpo": ("mini-sd", {"batches": 2, "batch": 8, "steps": 6}, {"batches": 1, "batch": 4, "steps": 4}),
    "flow_grpo": ("mini-sd3", {"batches": 2, "batch": 8, "steps": 6}, {"batches": 1, "batch": 4, "steps": 4}),
    "alignprop": ("mini-sd", {"batches": 2, "batch": 4, "steps": 6}, {"batches": 1, "batch": 2, "steps": 4}),
    "dpo": ("mini-sd", {"batches": 2, "batch": 8}, {"batches": 1, "batch": 4}),
}
# The peers that do the same.
PEERS = {"ddpo": ("ddpo_pytorch", "trl"), "flow_grpo": (), "alignprop": ("trl",), "dpo": ("diffusers_dpo",)}
