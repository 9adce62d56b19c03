"""Base against aligned models: LoRAs that come and go without a trace, the path KL, diversity."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ... import lora
from ...data.prompts import Prompt
from ...driving.denoisers import denoisers
from ...files import lora_finder
from ...policy import Policy, noise_seed
from ...rewards import load_reward
from ...rewards.clip_embedder import CLIPEmbedder
from ...rewards.preprocessing import flatten_frames, mean_over_frames
from ...rewards.registry import model_option, reward_name
from ..run import costs
from ..run.inputs import batches_by_size, condition_of
from .statistics import diversity, pairwise_cosine, pairwise_rms


class Session:
    """What `sampling.evaluate` wants of a run, without one: the flags under its names, and the accelerator."""

    def __init__(self, args, accelerator: Accelerator):
        own = {"train_batch_size": args.batch_size, "eval_num_inference_steps": None, "eval_guidance_scale": None}
        self.args, self.accelerator, self.print = Namespace(**vars(args), **own), accelerator, accelerator.print


def load_rewards(specs: list[str], models: list[str] | None, device: torch.device, retries: int | None = None) -> dict[str, Any]:
    """Rewards by the name that they go by in the table.

    Args:
        models: for each, the checkpoint of its model, `default` for its own; None for all their own.
        retries: of those that ask a server; their own number if None.

    Raises:
        ValueError: there is no such reward, or two go by the same name.
    """
    checkpoints = [None if model == "default" else model for model in models or ["default"] * len(specs)]
    found = [load_reward(spec, device=device, retries=retries, **model_option(checkpoint)) for spec, checkpoint in zip(specs, checkpoints)]
    names = [reward_name(reward) for reward in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Rewards need different names, got {', '.join(names)}: evaluate those that share one in runs of their own.")
    return dict(zip(names, found))


def find_lora(name: str) -> Path:
    """The folder, or the `.safetensors` file, of a LoRA, and what its run cost if that is known (`diffusers_align.files.lora_finder.find`)."""
    return lora_finder.find(name, others=[costs.FILE])


@contextmanager
def lora_loaded(pipeline, path: Path | None, name: str, scale: float = 1.0) -> Iterator[None]:
    """Context: `pipeline` with the LoRA at `path` (None: as it is), at `scale` times its own. Afterwards it is unloaded, so that LoRAs do not
    stack.

    Raises:
        ValueError: the LoRA is not of this model.
    """
    if path is None:
        yield
        return
    try:
        try:
            lora.load(pipeline, denoisers(pipeline), path)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"LoRA {name!r} ({path}) is not of this {type(pipeline).__name__}: {error}") from error
        for layer in _layers(pipeline):
            layer.scale_layer(scale)
        yield
    finally:
        lora.unload(pipeline)


def _layers(pipeline) -> list[BaseTunerLayer]:
    return [layer for module in pipeline.components.values() if isinstance(module, nn.Module) for layer in lora.layers_of(module)]


def path_kl(policy: Policy, prompts: list[Prompt | str], seeds: list[int]) -> tuple[Tensor, int]:
    r"""KL from the policy to its reference over whole trajectories, in nats, (B,) float64, and the dimensions of a state. One term of

    $$ \mathrm{KL}\big(\pi_\theta(x_{0:T}) \,\|\, \pi_{\mathrm{ref}}(x_{0:T})\big)
       = \mathbb E_{\pi_\theta} \sum_t \mathrm{KL}\big(\pi_\theta(\cdot \mid x_t) \,\|\, \pi_{\mathrm{ref}}(\cdot \mid x_t)\big) $$

    a sample: the trajectory is drawn from the policy, and the Gaussian KL of each stochastic step is exact, so its mean over
    samples has no bias. It depends on the noise, and grows beyond all bounds as that goes to 0. It bounds the KL of the images
    from above, which is why DPOK (https://arxiv.org/abs/2305.16381) penalises it.

    Raises:
        ValueError: no step has noise, or the policy has no LoRA.
    """
    trajectory = policy.rollout(condition_of(policy, prompts, seeds=seeds))
    if not trajectory.stochastic.any():
        raise ValueError("No step has noise, so the path KL does not exist: raise --noise_level or --eta, or leave it out with --kl_samples 0.")
    if not any(lora.is_ours(module) for module in policy.denoisers.values()):
        raise ValueError("The policy has no LoRA of its own, so it is its reference: load it with policy.load_lora, not into the pipeline.")
    own = policy.transitions(trajectory)
    with policy.reference():
        reference = policy.transitions(trajectory)
    return torch.stack([own[k].kl(reference[k]) for k in own]).sum(0).double().cpu(), trajectory.final[0].numel()


def sampled_kl(run, policy: Policy, prompts: list[Prompt], number: int, on_images: Callable[[int], Any]) -> dict[str, Tensor]:
    """`path_kl` of `number` trajectories at fixed prompts and seeds, shared among the processes; all get the whole: (number,) each."""
    accelerator, asked, rows = run.accelerator, [prompts[i % len(prompts)] for i in range(number)], []
    for part in batches_by_size(asked, run.args.train_batch_size, accelerator.process_index, accelerator.num_processes):
        with accelerator.autocast():
            values, dimensions = path_kl(policy, [asked[i] for i in part], [noise_seed(run.args.seed, "kl", i) for i in part])
        rows += [(i, value, value / dimensions) for i, value in zip(part, values.tolist())]
        on_images(len(part) * accelerator.num_processes)
    _, nats, nats_per_dimension = (torch.tensor(column, dtype=torch.float64) for column in zip(*sorted({row[0]: row for row in gather_object(rows)}.values())))
    return {"nats": nats, "nats_per_dimension": nats_per_dimension}


@torch.no_grad()
def diversities(images: list[Tensor], prompts: list[str], embedder: CLIPEmbedder | None, batch_size: int) -> dict[str, Tensor]:
    """How far samples of the same prompt lie apart, one number per prompt: RMS difference of pixels, 1 - cosine of CLIP features."""
    found = {"pixel_rms": diversity(torch.stack([image.flatten() for image in images]), prompts, pairwise_rms)}
    if embedder is not None:
        batches = [torch.stack(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        features = torch.cat([mean_over_frames(embedder.images(flatten_frames(batch)), batch).cpu() for batch in batches])
        found["clip"] = diversity(torch.nn.functional.normalize(features, dim=-1), prompts, pairwise_cosine)
    return found
