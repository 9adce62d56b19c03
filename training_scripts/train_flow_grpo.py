"""Flow-GRPO: align a flow-matching pipeline with any reward by group-relative policy optimisation.

    accelerate launch training_scripts/train_flow_grpo.py --config training_scripts/recipes/flow_grpo_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/flow_grpo.py` (https://arxiv.org/abs/2505.05470).
"""

import random

import torch

from diffusers_align.algorithms.flow_grpo import describe_kl, flow_grpo_loss, gaussian_kl, official_kl
from diffusers_align.rl import describe_clip, group_advantages, ratio_diagnostics
from diffusers_align.training import arguments
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run
from diffusers_align.training.sampling import sample_epoch

# The paper's beta goes with the official form; for ten steps of equal length the exact KL is ten times as large.
KL_BETA = {"official": 0.04, "gaussian": 0.004}


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("Flow-GRPO")
    group.add_argument("--num_prompts_per_epoch", type=int, default=48, help="groups an epoch")
    group.add_argument("--group_size", type=int, default=24, help="samples of a prompt")
    group.add_argument("--same_latent", action=arguments.argparse.BooleanOptionalAction, default=False, help="one initial noise a group (DanceGRPO's default)")
    group.add_argument("--sde_type", default="flow_grpo", choices=["flow_grpo", "dance_grpo", "cps", "memoryless", "memoryless_em"])
    group.add_argument("--noise_level", type=float, default=0.7, help="the paper's a")
    group.add_argument("--sde_window_size", type=int, help="Flow-GRPO-Fast: that many consecutive SDE steps, ODE elsewhere; all steps if absent")
    group.add_argument("--sde_window_range", type=int, nargs=2, metavar=("FIRST", "END"), help="where the window may lie; the first half if absent")
    group.add_argument("--timestep_fraction", type=float, default=0.99, help="train the first steps only; 0.99 leaves out the last one")
    group.add_argument("--clip_range", type=float, default=1e-4, help="of the ratio per dimension")
    group.add_argument("--adv_clip_max", type=float, default=5.0)
    group.add_argument("--global_std", action=arguments.argparse.BooleanOptionalAction, default=True, help="divide advantages by the std of all rewards")
    group.add_argument("--kl_beta", type=float, help="weight of the KL to the pretrained model (official: 0.04, gaussian: 0.004); 0 saves its forward pass")
    group.add_argument("--kl_form", choices=["official", "gaussian"], default="official", help="official is the exact Gaussian KL times the step's length")
    args = arguments.parse(parser, argv)
    if args.kl_beta is None:
        args.kl_beta = KL_BETA[args.kl_form]
    if args.sde_window_size:
        args.sde_window_range = args.sde_window_range or (0, max(args.sde_window_size, args.num_inference_steps // 2))
        if args.sde_window_range[1] - args.sde_window_range[0] < args.sde_window_size:
            parser.error(f"--sde_window_range {args.sde_window_range} has no room for a window of --sde_window_size {args.sde_window_size}")
    return args


def sde_window(args, epoch):
    """The window of an epoch, the same for every group and process: groups that mix windows compare unlike samples."""
    first, end = args.sde_window_range
    start = random.Random(f"{args.seed}/{epoch}/window").randint(first, end - args.sde_window_size)
    return [start, start + args.sde_window_size]


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Flow-GRPO")
    num_batches, batches_a_step = run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    policy = run.load_policy(sde_type=args.sde_type, noise_level=args.noise_level)
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out
        if args.sde_window_size:
            policy.scheduler.register_to_config(sde_window=sde_window(args, epoch))
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)
        trajectory = samples.batches[0]
        last = int(trajectory.num_steps * args.timestep_fraction)
        steps = [k for k in trajectory.stochastic.nonzero().flatten().tolist() if k < max(1, last)]
        step_sizes = policy.scheduler.sigmas.diff().abs().tolist()[-trajectory.num_steps :]
        dimensions = trajectory.final[0].numel()
        run.explain_once(describe_clip(args.clip_range, dimensions), describe_kl(args.kl_beta, args.kl_form, step_sizes))

        # 2 advantages
        advantages = group_advantages(samples.rewards, samples.groups, global_std=args.global_std)
        advantages = advantages.clamp(-args.adv_clip_max, args.adv_clip_max).to(run.accelerator.device)

        # 3 loss and update
        diagnostics, norms, kls = [], [], []
        for chunk in run.chunks(num_batches, batches_a_step):
            diagnostics.append([])
            weight = run.loss_weight(samples, chunk, len(steps))
            for b in chunk:
                trajectory, advantage, reference = samples.batches[b], advantages[samples.index[b]], {}
                if args.kl_beta > 0:
                    with torch.no_grad(), policy.reference(), run.accelerator.autocast():
                        policy.replay(trajectory, lambda k, transition: reference.update({k: transition.mean}), steps)

                def on_step(k, transition):
                    old, new = trajectory.log_probs[:, k], transition.log_prob(trajectory.actions[:, k])
                    loss = flow_grpo_loss(new, old, advantage, per_dim=dimensions, clip_range=args.clip_range)
                    if args.kl_beta > 0:
                        kl = gaussian_kl(transition.mean, reference[k], transition.std)
                        if args.kl_form == "official":
                            kl = official_kl(transition.mean, reference[k], transition.std, step_sizes[k])
                        loss = loss + args.kl_beta * kl
                        kls.append(kl.mean().item())
                    run.accelerator.backward(loss.sum() * weight)
                    diagnostics[-1].append(ratio_diagnostics(new, old, args.clip_range, dimensions))

                with run.accelerator.autocast():
                    policy.replay(trajectory, on_step, steps)
            norms.append(run.optimizer_step())
        run.log(run.epoch_metrics(samples, diagnostics, norms, {"kl": kls}))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
