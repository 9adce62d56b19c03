"""The flags that several methods share, each with the module that acts on them."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from .common import WITH_STRENGTH, LearningRate, SDEType, TrainingArguments
from .data import NoisedImageArguments
from .options import Arguments, Count, NonNegative, Positive, PositiveShare, Probability, Real, StepIndex, Steps, option

Eta = Annotated[float, Interval(gt=0, le=1)]
NoiseLevel = Annotated[float, Interval(gt=0, le=100)]
GroupSize = Annotated[int, Interval(ge=2, le=10**6)]
# Below 1, so that the least ratio has a logarithm.
ClipRange = Annotated[float, Interval(gt=0, lt=1)]
LEARNED = {"advantage": ("gae", "value")}
PAPERS_NOISE = {"flow_grpo": 0.7, "dance_grpo": 0.3, "cps": 0.8}


class GroupArguments(Arguments):
    """groups and advantages"""

    # The defaults are Flow-GRPO's (https://arxiv.org/abs/2505.05470, official code). Used by `online.group_advantages`.
    num_prompts_per_epoch: Count = option(48, "groups per epoch")
    group_size: GroupSize = option(24, "samples per prompt; with one there is nothing to compare")
    same_latent: bool = option(False, "one initial noise per group (DanceGRPO's default)")
    scout_pool: Annotated[int, Interval(ge=0, le=10**6)] = option(
        0,
        "candidates per prompt, sampled along the ODE in --scout_steps: the best and worst of them, --group_size in all, are sampled anew from the same "
        "initial noise and trained on (Sol-RL); 0 is off",
        advanced=True,
    )
    scout_steps: Steps | None = option(
        None, "solver steps of those candidates; half of --num_inference_steps if absent", needs={"scout_pool": True}, advanced=True
    )
    adv_clip_max: Positive = option(5.0, "largest advantage, and smallest but for its sign", advanced=True)
    global_std: bool = option(True, "divide advantages by the std of all rewards", needs={"baseline": "group", "multi_reward": "sum"}, advanced=True)
    std_ddof: Annotated[int, Interval(ge=0, le=1)] = option(
        0, "0 divides the variance by n (numpy), 1 by n - 1 (torch, DanceGRPO)", needs={"baseline": "group"}, advanced=True
    )
    baseline: Literal["group", "leave_one_out"] = option(
        "group", "of a sample: its group's mean, over the std; or the others' mean alone (RLOO)", advanced=True
    )
    multi_reward: Literal["sum", "gdpo"] = option("sum", "of a sum of rewards: add up first, or normalise each in its group first", advanced=True)

    @model_validator(mode="after")
    def _check_scout_pool(self):
        if not self.scout_pool:
            return self
        if self.scout_pool <= self.group_size:
            raise ValueError(
                f"--scout_pool must be more than --group_size {self.group_size}, so many of which are chosen by their samples of --scout_steps, "
                f"got {self.scout_pool}"
            )
        if self.same_latent:
            raise ValueError("--scout_pool chooses by the initial noise, and --same_latent gives a group one alone: leave out one of the two")
        self.scout_steps = self.scout_steps or max(1, self.num_inference_steps // 2)
        return self

    @model_validator(mode="after")
    def _check_baseline(self):
        if self.multi_reward == "gdpo" and self.baseline != "group":
            raise ValueError("--multi_reward gdpo normalises each reward in its group: leave out --baseline leave_one_out")
        return self


class NoisyGroupArguments(GroupArguments):
    """groups and advantages"""

    # Of methods that sample with noise in their steps.
    share_prefix: bool = option(
        True, "walk the steps before --sde_window once for samples of one initial noise: the same up to rounding", needs={"same_latent": True}, advanced=True
    )


class NoiselessGroupArguments(GroupArguments, advanced={"same_latent"}):
    """groups and advantages"""

    # Of methods that sample along the ODE.
    @model_validator(mode="after")
    def _check_same_latent(self):
        if self.same_latent:
            raise ValueError("--same_latent: this script samples without noise in its steps, so all images of a group would be equal. Leave it out")
        return self


class NoisingArguments(Arguments):
    """noised samples"""

    # Used by `online.forward_samples`.
    timestep_scheme: Literal["uniform", "logit_normal", "grid"] = option("grid", "where to train: on the sampler's own steps, or over the training range")
    num_train_timesteps: Steps | None = option(None, "timesteps per sample, in equal strata; as many as the grid has if absent")
    timestep_fraction: PositiveShare = option(0.99, "grid: train the first steps only; 0.99 leaves out the last one")
    shared_timesteps: bool = option(False, "the same timesteps for all samples of an epoch")

    @model_validator(mode="after")
    def _check_fraction(self):
        if self.timestep_scheme != "grid" and self.num_train_timesteps is not None and "timestep_fraction" in self.model_fields_set:
            raise ValueError(f"--timestep_fraction has no effect with --timestep_scheme {self.timestep_scheme} and --num_train_timesteps: leave it out")
        return self


class WindowArguments(Arguments):
    """noise"""

    sde_window: tuple[StepIndex, StepIndex] | None = option(
        None, "solver steps that have noise, from FIRST up to END, which has none; all if absent", metavar=("FIRST", "END")
    )

    @model_validator(mode="after")
    def _check_window(self):
        if self.sde_window is not None and not self.sde_window[0] < self.sde_window[1] <= self.num_inference_steps:
            raise ValueError(
                f"--sde_window {self.sde_window[0]} {self.sde_window[1]} must be a first step and a later end within the {self.num_inference_steps} solver "
                "steps of --num_inference_steps"
            )
        return self


class StrengthArguments(Arguments):
    """noise"""

    sde_type: SDEType | None = option(None, "kernel of flow matching's noise; flow_grpo if absent")
    noise_level: NoiseLevel | None = option(
        None, "its strength, the papers' a or eta: 0.7 for flow_grpo, 0.3 for dance_grpo, 0.8 for cps if absent", needs={"sde_type": WITH_STRENGTH}
    )
    eta: Eta | None = option(
        None, "weight of the DDIM kernel's noise, for diffusion models; 1 if absent where the script has no kernel of flow matching by default"
    )

    @model_validator(mode="after")
    def _check_noise(self):
        if self.eta is not None and (of_flow := [name for name in ("sde_type", "noise_level") if self.given(name)]):
            raise ValueError(f"--eta is the noise of diffusion, --{' and --'.join(of_flow)} that of flow matching: leave out those of the other kind")
        if self.eta is not None:
            self.sde_type = None  # of a script whose default it is
        if self.noise_level is None and self.sde_type in PAPERS_NOISE:
            self.noise_level = PAPERS_NOISE[self.sde_type]
        if self.sde_type == "cps" and self.noise_level > 1:
            raise ValueError(f"--noise_level of --sde_type cps must be above 0 and at most 1, got {self.noise_level:g}")
        return self


class NoiseArguments(WindowArguments, StrengthArguments):
    """noise"""

    # Used by `online.sampling.noise_fields`.


class StepArguments(Arguments):
    """trained steps"""

    # Used by `online.trained_steps`.
    timestep_fraction: PositiveShare = option(0.99, "train the first steps only; 0.99 leaves out the last one")
    random_timestep_fraction: PositiveShare = option(1.0, "train a random share of those, drawn anew each epoch (DanceGRPO)", advanced=True)


class ReplayArguments(Arguments):
    """trained steps"""

    # Used by `online.policy_gradient`.
    replay_steps_per_forward: Steps = option(
        1,
        "solver steps of an update in one denoiser call: equal gradients up to rounding, so many times the activations; for small batches on a GPU",
        advanced=True,
        resume="free",
    )
    unconditional_gradient: bool = option(
        True, "without it, guidance's rows without the prompt get no gradient in the updates: faster, and the gradient is biased", advanced=True
    )


class KLShareArguments(Arguments):
    """KL to the pretrained model"""

    kl_share: PositiveShare = option(
        1.0,
        "compute the KL at a random share of the trained steps alone, weighted so that its mean is the same: fewer denoiser calls, more noise",
        needs={"kl_weight": True},
        advanced=True,
    )


class ValueArguments(Arguments):
    """value baseline"""

    # The defaults are DPOK's (https://arxiv.org/abs/2305.16381, official code). Used by `online.value_baseline`; the script says in `needs` with which
    # --advantage they have an effect.
    gae_lambda: Probability = option(
        0.95, "of the advantages and of the value's targets: 1, what was earned; below 1 later values stand in for part of it", needs={"advantage": "gae"}
    )
    value_learning_rate: LearningRate = option(1e-4, "of the baseline", needs=LEARNED, resume="takes effect")
    value_batch_size: Count = option(256, "transitions of a minibatch", needs=LEARNED, advanced=True)
    value_accumulation_steps: Count = option(5, "minibatches of an optimizer step", needs=LEARNED, advanced=True)
    value_steps: Count = option(1, "optimizer steps of the baseline per epoch", needs=LEARNED, advanced=True, resume="takes effect")
    value_buffer_size: Count = option(1000, "latest transitions kept; at most half are of one epoch", needs=LEARNED, advanced=True)


class PretrainingLossArguments(Arguments):
    """pre-training loss"""

    # Used by `gradient.pretraining`, and by RWR.
    pretrain_dataset_name: str | None = option(
        None, "captioned images (a file, a folder, a set of the Hub) for plain fine-tuning besides", advanced=True, resume="content"
    )
    pretrain_weight: NonNegative | None = option(None, "of that loss; 1 if absent, as in ReFL's paper", needs={"pretrain_dataset_name": True}, advanced=True)

    @model_validator(mode="after")
    def _fill_pretrain_weight(self):
        if self.pretrain_weight is None:
            self.pretrain_weight = 1.0 if self.pretrain_dataset_name else 0.0
        return self


# Each does something where there are such images, and few runs have them.
OF_CAPTIONED = [name for name in NoisedImageArguments.model_fields if name != "config"]


class PretrainingArguments(
    PretrainingLossArguments, NoisedImageArguments, needs={name: {"pretrain_dataset_name": True} for name in OF_CAPTIONED}, advanced=OF_CAPTIONED
):
    """pre-training loss"""


class RewardGradientArguments(PretrainingArguments, TrainingArguments, defaults={"gradient_accumulation_steps": 1}):
    """reward gradients"""

    # Used by `gradient.loop`. One batch per step: on-policy however many updates an epoch has, each samples anew.
    num_samples_per_epoch: Count = option(128, "one per prompt: the stretch between two lines of the log")
    reward_map: Literal["none", "hinge", "distance", "shortfall"] = option("none", "the loss: -r, max(0, target - r), |target - r|, or target - r")
    reward_target: Real | None = option(None, "a margin, a target, or the best possible reward", needs={"reward_map": ("hinge", "distance", "shortfall")})
    reward_scale: Positive = option(1.0, "factor of that loss: with Adam, its weight against --kl_weight and the clipping")
    kl_weight: NonNegative = option(0.0, "of the distance to the pretrained model at the trained steps; 0 saves its forward pass", resume="takes effect")
    grad_clip_quantile: PositiveShare | None = option(None, "also clip at this quantile of the last 100 gradient norms", advanced=True, resume="takes effect")
    stochastic: bool = option(False, "roll out with the SDE twin's noise; otherwise by the pipeline's own solver")
    eta: Probability | None = option(
        None, "of that noise for diffusion: 0 is DDIM's ODE, 1 (if absent) ancestral sampling", needs={"stochastic": True}, advanced=True
    )
    checkpoint_steps: bool | None = option(
        None, "compute each step's activations again on the way back; if absent, where a sample has several with gradient", advanced=True, resume="free"
    )
    checkpoint_decoder: bool = option(True, "compute the autoencoder's activations again on the way back", advanced=True, resume="free")

    @model_validator(mode="after")
    def _check_reward_map(self):
        if self.reward_map != "none" and self.reward_target is None:
            self.reward_target = self.usual_target()
        if self.reward_map != "none" and self.reward_target is None:
            raise ValueError(f"--reward_map {self.reward_map} needs --reward_target")
        return self

    def usual_target(self) -> float | None:
        """The target of a method's own map, where `--reward_target` is absent."""
        return None
