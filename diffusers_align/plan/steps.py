"""One gradient step of a script, by the library's own functions, on whatever models a policy has: fake ones for a plan, real ones for a check of it.

A family is what a script's step is made of; a script that is in none is refused by name. What the losses cost beside the models is numbers a sample, so
they are not the scripts' own: a sum has the same graph.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms import alignprop, draft, drtune, refl, vader
from ..algorithms.adjoint_matching import matched_steps
from ..condition import Condition
from ..data.prompts import Prompt
from ..driving.latent_layout import autoencoded, encoder_of
from ..gradients.rollout import differentiable_rollout
from ..policy import Policy
from ..training.gradient.adjoints import make_memoryless, matching_targets, noisy_steps, reward_gradient
from ..training.gradient.losses import total_loss
from ..training.gradient.reward_check import count_frames
from ..training.offline.descent import Reference, descend
from ..training.offline.noised_latents import Noised, predict
from ..training.online.policy_gradient import add_gradient, forwards_of
from ..training.online.sampling import noise_fields
from ..training.online.trained_steps import some_of, trained_steps
from ..trajectory import Trajectory
from .meter import Meter, Work

PROMPT = "a red fox in front of a blue window"


class Bench:
    """What the library's steps want of a run, and a meter.

    Attributes:
        trajectory: of the latest roll-out.
    """

    def __init__(self, args: Any, policy: Policy, meter: Meter):
        self.args, self.policy, self.meter, self.accelerator = args, policy, meter, self
        self.parameters = policy.trainable_parameters()
        self.step_skipped, self.trajectory = False, None

    def autocast(self):
        """Context, as accelerate's: half precision where `--mixed_precision` says so."""
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.args.mixed_precision, torch.float32)
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    @staticmethod
    def backward(loss: Tensor) -> None:
        loss.backward()

    @property
    def size(self) -> int:
        """Samples of a batch."""
        return min(self.args.train_batch_size, samples_of(self.args))

    def condition(self, number: int | None = None, **options: Any):
        """Of different prompts."""
        number = self.size if number is None else number
        return self.policy.condition([f"{PROMPT} {i}" for i in range(number)], seeds=list(range(number)), **options)

    @contextmanager
    def measured(self) -> Iterator[Work]:
        """Context: a `Work`. Gradients are there before, as in all batches but the first."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        with self.meter.measure() as work:
            yield work


@dataclass(frozen=True)
class Stage:
    """A part of an epoch.

    Attributes:
        name: of it, in words.
        once: does it for a batch.
        times: how often an epoch has it, on all processes.
        has_gradient: whether it is of the gradient step.
    """

    name: str
    once: Callable[[], object]
    times: float
    has_gradient: bool = True


def samples_of(args: Any) -> int:
    """Samples, or pairs, of an epoch."""
    if getattr(args, "num_samples_per_epoch", None):
        return args.num_samples_per_epoch
    return args.num_prompts_per_epoch * (getattr(args, "group_size", None) or 1)


def batches_of(args: Any) -> int:
    """Batches of an epoch, on all processes together."""
    return -(-samples_of(args) // args.train_batch_size)


def _roll_out(bench: Bench, **options: Any) -> Trajectory:
    with bench.autocast():
        bench.trajectory = bench.policy.rollout(bench.condition(**options))
    with torch.no_grad():
        bench.policy.outcome(bench.trajectory).to(torch.float32)
    return bench.trajectory


def policy_gradient(bench: Bench) -> list[Stage]:
    """DDPO, Flow-GRPO: roll-outs that are replayed with a loss on log-probabilities."""
    args, policy = bench.args, bench.policy
    size = getattr(args, "sde_window_size", None)
    if size is not None:
        policy.scheduler.register_to_config(sde_window=[args.sde_window[0], args.sde_window[0] + size])
    trajectory = _roll_out(bench)
    shares = getattr(args, "timestep_fraction", 1.0), getattr(args, "random_timestep_fraction", 1.0)
    steps = trained_steps(trajectory, *shares)
    if not steps:
        raise ValueError("No step with noise is left to train: raise the noise or the timestep fraction.")

    def loss(k: int, transition: Any, reference: Any) -> Tensor:
        value = transition.log_prob(bench.trajectory.actions[:, k])
        return (value if reference is None else value + (transition.mean - reference.mean).square().flatten(1).sum(1)).sum()

    forwards = forwards_of(args, len(steps))
    together = min(forwards.steps, len(steps)) if forwards else 1
    name = "replayed step" if together == 1 else f"{together} replayed steps"

    def step(held: list[int]) -> None:
        add_gradient(bench, policy, bench.trajectory, steps[:together], loss, held, forwards)

    if forwards:
        step([])  # what is found out once is no part of an epoch
    held = len(some_of(steps, args.kl_share, "")) if getattr(args, "kl_weight", 0) else 0
    found = [Stage("roll-out", lambda: _roll_out(bench), batches_of(args), False), *_scouts(bench)]
    found += [Stage(f"{name}, with KL", lambda: step(steps[:together]), batches_of(args) * held / together)] if held else []
    return found + ([Stage(name, lambda: step([]), batches_of(args) * (len(steps) - held) / together)] if held < len(steps) else [])


def _scouts(bench: Bench) -> list[Stage]:
    """The candidates of `--scout_pool`, of which nothing is kept."""
    args = bench.args
    if not getattr(args, "scout_pool", 0):
        return []

    def sample() -> None:
        with bench.autocast(), torch.no_grad():
            bench.policy.outcome(bench.policy.rollout(bench.condition(num_inference_steps=args.scout_steps), deterministic=True)).to(torch.float32)

    return [Stage("scouts", sample, -(-args.num_prompts_per_epoch * args.scout_pool // args.train_batch_size), False)]


def pairs(bench: Bench) -> list[Stage]:
    """Diffusion-DPO and its relatives: two sides at noised latents, against the model below the LoRA."""
    args, policy, number = bench.args, bench.policy, bench.size
    latents = _final_latents(bench)
    reference = Reference(bench, policy)
    times = torch.linspace(0.2, 0.8, number) * policy.scheduler.time_range[1]
    times = times.round() if policy.scheduler.time_range[1] > 10 else times

    def noised(condition: Condition) -> Noised:
        return Noised(torch.zeros_like(latents), times, condition, torch.zeros_like(latents, dtype=torch.float32), torch.ones(number))

    @torch.no_grad()
    def invert() -> None:
        predict(bench, policy, noised(bench.condition()))

    def step() -> None:
        condition = bench.condition()
        sides = [noised(condition) for _ in range(2)]
        if getattr(args, "loss", None) != "mapo":
            reference(*sides)
        descend(bench, policy, lambda winner, loser: winner.error - loser.error, sides, 1.0)

    inversions = 2 * getattr(args, "inversion_steps", 0)
    found = [Stage("inversion step", invert, batches_of(args) * inversions)] if inversions else []
    return [_pictures(bench, latents, sides=2), *found, Stage("pairs", step, batches_of(args))]


def _pictures(bench: Bench, latents: Tensor, sides: int) -> Stage:
    """The data set's pictures as latents: of every batch, or with `--cache_dir` in the first epoch alone."""
    policy, vae = bench.policy, encoder_of(bench.policy.pipeline)
    with torch.no_grad():
        images = torch.zeros_like(policy.decode(latents, bench.condition()), dtype=torch.float32)

    def encode() -> None:
        for _ in range(sides):
            with torch.no_grad():
                autoencoded(vae, images, video=images.ndim == 5)

    return Stage("encoding pictures", encode, 0 if bench.args.cache_dir else batches_of(bench.args), False)


@torch.no_grad()
def _final_latents(bench: Bench) -> Tensor:
    """Shaped as a batch's final latents, without the denoiser."""
    found: list[Tensor] = []

    def skip(step: Any) -> Tensor:
        step.skip()
        found.append(step.sample)
        return step.sample

    with bench.autocast():
        bench.policy.drive(bench.condition(), skip, needs_denoiser=lambda k: False)
    return torch.zeros_like(found[-1])


def _choices(bench: Bench, num_steps: int) -> dict[str, Any]:
    """Which solver steps of the roll-out carry gradient, in one draw of them."""
    args, draw = bench.args, torch.Generator().manual_seed(0)
    if hasattr(args, "backprop_mode"):
        frames = count_frames(bench.policy, Prompt(PROMPT))
        chosen = {"grad_steps": vader.grad_steps(num_steps, draw, mode=args.backprop_mode, specific=args.backprop_step)}
        return chosen | ({} if frames is None else {"frames": vader.frame_indices(frames, draw, mode=args.frames)})
    if hasattr(args, "truncation_schedule"):
        how = {"strategy": args.truncation_schedule, "mean": args.truncation_mean, "std": args.truncation_std, "fixed": args.truncation_step}
        return {"grad_steps": alignprop.grad_steps(num_steps, alignprop.truncation(num_steps, draw, **how))}
    if hasattr(args, "window"):
        k = refl.middle_step(num_steps, draw, window=tuple(args.window))
        return {"grad_steps": [k], "stop_step": k}
    if args.method == "drtune":
        steps, stop = drtune.grad_steps(num_steps, draw, number=args.num_trained_steps, skip_last_steps=args.skip_last_steps)
        return {"grad_steps": steps, "stop_step": stop, "detach_input": True}
    return {"grad_steps": draft.grad_steps(num_steps, {"draft": None, "draft_k": args.truncation}[args.method])}


def scores(images: Tensor) -> Tensor:
    """A differentiable reward that has no model, (B,)."""
    return images.float().flatten(1).mean(1)


def reward_gradients(bench: Bench) -> list[Stage]:
    """DRaFT, DRTune, AlignProp, ReFL, VADER: the reward's gradient through the last steps of a roll-out."""
    args, policy = bench.args, bench.policy
    if getattr(args, "adjoint", False) or getattr(args, "method", None) in ("draft_lv", "srpo"):
        raise ValueError("A plan knows --method draft, draft_k and drtune without --adjoint: what the others do after the roll-out is not in it yet.")
    options = {"stochastic": args.stochastic, "checkpoint": args.checkpoint_steps, "decode_checkpoint": args.checkpoint_decoder}
    chosen = _choices(bench, args.num_inference_steps)

    def step() -> None:
        with bench.autocast():
            rollout = differentiable_rollout(policy, bench.condition(), **options, **chosen)
            loss = total_loss(policy, rollout, scores(rollout.images), args, {"kl": []})
        bench.backward(loss.sum())

    return [Stage("roll-out with gradient", step, batches_of(args))]


def adjoints(bench: Bench) -> list[Stage]:
    """Adjoint Matching: a roll-out, the reward's gradient, its way back through the pretrained model, regression at some of the steps."""
    args, policy = bench.args, bench.policy
    make_memoryless(policy, args.sde_type)
    off = {} if args.cfg == "everywhere" else policy.guidance_off(bench.condition(1))
    sampling = off if args.cfg == "none" else {}
    trajectory = _roll_out(bench, **sampling)
    steps = matched_steps(noisy_steps(policy.scheduler, trajectory, args.min_std), args.last_steps, args.random_steps, random.Random(0))
    copies = max(1, args.smoothing_copies)

    def condition():
        own = bench.trajectory.condition
        return replace(own, kwargs=own.kwargs | off)

    def targets() -> None:
        with bench.autocast():
            matching_targets(policy, bench.trajectory, steps, lambda x: reward_gradient(policy, x, bench.trajectory.condition, scores), 1.0, condition())

    def again() -> None:
        reward_gradient(policy, bench.trajectory.final, bench.trajectory.condition, scores)

    def step() -> None:
        with bench.autocast():
            policy.replay(bench.trajectory, lambda k, transition: bench.backward(transition.mean.square().sum()), steps[:1], condition())

    batches = batches_of(args)
    found = [Stage("roll-out", lambda: _roll_out(bench, **sampling), batches, False), Stage("reward's gradient, adjoints", targets, batches)]
    found += [Stage("further gradients of the reward", again, batches * (copies - 1))] if copies > 1 else []
    return [*found, Stage("regression at a step", step, batches * len(steps))]


FAMILIES: dict[str, Callable[[Bench], list[Stage]]] = {
    **dict.fromkeys(("train_ddpo", "train_flow_grpo"), policy_gradient),
    **dict.fromkeys(("train_dpo", "train_dspo"), pairs),
    **dict.fromkeys(("train_draft", "train_alignprop", "train_refl", "train_vader"), reward_gradients),
    "train_adjoint_matching": adjoints,
}


def check_known(script: str) -> None:
    """Raises ValueError where no plan is known for a script: before its flags are read, of which the others' lack some."""
    if script not in FAMILIES:
        raise ValueError(f"No plan is known for {script}.py; there is one for {', '.join(sorted(FAMILIES))}. A script of the same kind takes about the same.")


def stages(script: str, bench: Bench) -> list[Stage]:
    """The parts of an epoch of a script.

    Raises:
        ValueError: a script, or a flag of it, that no plan is known for.
    """
    check_known(script)
    if getattr(bench.args, "update", None) == "trpo":
        raise ValueError("A plan knows --update adamw alone: a trust-region step is made of replays of all steps under forward-mode products.")
    if getattr(bench.args, "pretrain_dataset_name", None):
        raise ValueError("A plan knows no --pretrain_dataset_name: plan without it. Its batches take less than a step of the reward's.")
    if getattr(bench.args, "input_columns", None):
        raise ValueError("A plan has no pictures for --input_columns: plan without it, with a pipeline that takes prompts alone.")
    return FAMILIES[script](bench)


def noise_of(args: Any) -> dict[str, Any]:
    """The fields of the SDE scheduler that the script gives."""
    if hasattr(args, "reward_map"):
        return {} if args.eta is None else {"eta": args.eta}
    return {} if hasattr(args, "min_std") else noise_fields(args)
