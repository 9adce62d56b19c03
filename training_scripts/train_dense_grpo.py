"""DenseGRPO: Flow-GRPO with a reward for every step, and noise that is calibrated to each.

    accelerate launch training_scripts/train_dense_grpo.py --config training_scripts/recipes/dense_grpo_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/dense_grpo.py` (https://arxiv.org/abs/2601.20218).
"""

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from diffusers_align.training.flags.common import SamplingArguments
from diffusers_align.training.flags.methods import GroupArguments, NoiseLevel, check_window
from diffusers_align.training.flags.options import NonNegative, Positive, PositiveShare, StepIndex, option, parse

CALIBRATED = {"calibration_rounds": True}


class DenseGRPOArguments(GroupArguments, SamplingArguments, defaults={"global_std": False}):
    """DenseGRPO"""

    psi_init: NoiseLevel = option(0.3, "noise of every step before calibration: psi sqrt(-dt); 0.3 is DanceGRPO's")
    calibration_rounds: Annotated[int, Interval(ge=0, le=10**4)] = option(20, "rounds of sampling that set psi before training; 0 keeps --psi_init")
    calibration_tolerance: NonNegative | None = option(
        None, "psi rises where gains and losses differ by fewer samples (paper: 2); sqrt(samples) if absent", needs=CALIBRATED
    )
    calibration_increment: Annotated[float, Interval(gt=0, le=1)] = option(0.01, "by which psi moves in a round: the paper's epsilon_2", needs=CALIBRATED)
    sde_window: tuple[StepIndex, StepIndex] | None = option(None, "steps with noise; all if absent. Fewer need fewer completions", metavar=("FIRST", "END"))
    timestep_fraction: PositiveShare = option(0.99, "train the first steps only; 0.99 leaves out the last one")
    clip_range: Positive = option(1e-4, "of the ratio per dimension")
    kl_beta: NonNegative = option(0.04, "weight of the KL to the pretrained model; 0 saves its forward pass")
    kl_form: Literal["official", "gaussian"] = option("official", "official is the exact Gaussian KL times the step's length", needs={"kl_beta": True})

    @model_validator(mode="after")
    def _check_dense_rewards(self):
        check_window(self.sde_window, self.num_inference_steps)
        if self.multi_reward != "sum":
            raise ValueError(f"--multi_reward {self.multi_reward}: for each step there is only the sum of the rewards; leave it out")
        return self


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(DenseGRPOArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from diffusers_align.algorithms.dense_grpo import gain_metrics, step_gains
from diffusers_align.algorithms.flow_grpo import describe_kl, flow_grpo_loss, kl_penalty
from diffusers_align.rl import describe_clip, ratio_diagnostics
from diffusers_align.training import Report, Run
from diffusers_align.training.online.group_advantages import advantages_of
from diffusers_align.training.online.sampling import sample_epoch
from diffusers_align.training.online.step_rewards import NoiseLevels, calibrate_noise, completion_rewards


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DenseGRPO")
    num_batches, batches_a_step = run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    policy = run.load_policy(sde_type="dance_grpo", sde_window=args.sde_window)
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    levels = NoiseLevels(args.psi_init, args.num_inference_steps)
    run.register("noise_levels", levels)
    run.resume()
    report.start()
    calibrate_noise(run, policy, report.reward, report.prompts, levels)

    for epoch in run.epochs():
        # 1 roll out, and complete from the states on the way
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)
        trajectory = samples.batches[0]
        last = int(trajectory.num_steps * args.timestep_fraction)
        steps = [k for k in trajectory.noisy_steps if k < max(1, last)]
        step_sizes = policy.scheduler.sigmas.diff().abs().tolist()[-trajectory.num_steps :]
        dimensions = trajectory.final[0].numel()
        run.explain_once(describe_clip(args.clip_range, dimensions), describe_kl(args.kl_beta, args.kl_form, step_sizes))
        gains = step_gains(completion_rewards(run, policy, report.reward, samples, steps))

        # 2 advantages
        advantages = advantages_of(samples, args, report.reward, gains).to(run.accelerator.device)

        # 3 loss and update
        diagnostics, norms, kls = [], [], []
        for chunk in run.chunks(num_batches, batches_a_step):
            diagnostics.append([])
            weight = run.loss_weight(samples, chunk, len(steps))
            for b in chunk:
                trajectory, advantage, reference = samples.batches[b], advantages[samples.index[b]], {}
                if args.kl_beta > 0:
                    with policy.reference(), run.accelerator.autocast():
                        reference = policy.transitions(trajectory, steps)

                def on_step(k, transition):
                    old, new = trajectory.log_probs[:, k], transition.log_prob(trajectory.actions[:, k])
                    loss = flow_grpo_loss(new, old, advantage[:, k], per_dim=dimensions, clip_range=args.clip_range)
                    if args.kl_beta > 0:
                        kl = kl_penalty(transition.mean, reference[k].mean, transition.std, step_sizes[k], form=args.kl_form)
                        loss = loss + args.kl_beta * kl
                        kls.append(kl.mean().item())
                    run.accelerator.backward(loss.sum() * weight)
                    diagnostics[-1].append(ratio_diagnostics(new, old, args.clip_range, dimensions))

                with run.accelerator.autocast():
                    policy.replay(trajectory, on_step, steps)
            norms.append(run.optimizer_step())
        run.log({**run.epoch_metrics(samples, diagnostics, norms, {"kl": kls}), **gain_metrics(gains)})
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
