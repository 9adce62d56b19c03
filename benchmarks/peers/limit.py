"""What cannot be saved: the bare denoiser with the same LoRA, as often forward and backward, on inputs that are ready; the autoencoder; AdamW."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.tasks import LAYERS, LEARNING_RATE, PIXELS, PROMPTS, RANK, Task

SD3_LAYERS = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]


class Bare:
    """A pipeline's denoiser and autoencoder, and one call's inputs, kept from the pipeline itself."""

    def __init__(self, task: Task):
        self.task = task
        pipe = DiffusionPipeline.from_pretrained(task.model)
        self.vae, self.denoiser = pipe.vae, pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        pipe.set_progress_bar_config(disable=True)
        for part in (self.vae, self.denoiser):
            part.requires_grad_(False)
        self.denoiser.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS if hasattr(pipe, "unet") else SD3_LAYERS))
        self.layers = [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        self.optimizer = torch.optim.AdamW([p for p in self.denoiser.parameters() if p.requires_grad], LEARNING_RATE)
        self.rows = 2 * task.batch
        handle = self.denoiser.register_forward_pre_hook(self._keep, with_kwargs=True)
        prompts, short = (PROMPTS * self.rows)[: self.rows], {} if hasattr(pipe, "unet") else {"max_sequence_length": 1}
        pipe(prompts, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **short)
        handle.remove()
        self.pixels = torch.zeros(self.rows, 3, PIXELS, PIXELS)

    def _keep(self, module, args, kwargs) -> None:
        kwargs = dict(kwargs)
        self.x, self.rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.named, self.first = kwargs | {"return_dict": False}, None if args else "hidden_states"

    def __call__(self, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        given, named = ((x,), {}) if self.first is None else ((), {self.first: x})
        return self.denoiser(*given, *self.rest, **named, **self.named)[0]

    @torch.no_grad()
    def look(self, times: int = 1, reference: bool = False) -> None:
        """Forward passes without gradient."""
        if reference:
            self._adapters(False)
        for _ in range(times):
            self()
        if reference:
            self._adapters(True)

    def _adapters(self, on: bool) -> None:
        for layer in self.layers:
            layer.enable_adapters(on)

    def descend(self) -> None:
        self().square().mean().backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def online(bare: Bare, task: Task) -> None:
    """DDPO trains all steps, Flow-GRPO those with noise and looks at the reference in each."""
    for _ in range(task.batches):
        bare.look(task.steps)
        with torch.no_grad():
            bare.vae.decode(bare.x[: task.batch])
    for _ in range(task.batches):
        for _ in range(task.steps if task.method == "ddpo" else task.steps - 1):
            if task.method == "flow_grpo":
                bare.look(reference=True)
            bare.descend()
        bare.step()


def alignprop(bare: Bare, task: Task) -> None:
    for _ in range(task.batches):
        bare.look(task.steps - task.grad_steps)
        x = bare.x
        for _ in range(task.grad_steps):
            x = x - 0.1 * checkpoint(bare, x, use_reentrant=False)
        bare.vae.decode(x[: task.batch], return_dict=False)[0].mean().backward()
    bare.step()


def dpo(bare: Bare, task: Task) -> None:
    for _ in range(task.batches):
        with torch.no_grad():
            bare.vae.encode(bare.pixels)
        bare.look(reference=True)
        bare.descend()
        bare.step()


def train(worker, task: Task, path) -> None:
    bare = Bare(task)
    epoch = {"ddpo": online, "flow_grpo": online, "alignprop": alignprop, "dpo": dpo}[task.method]
    for _ in worker.epochs():
        epoch(bare, task)
