"""MV-GRPO: Flow-GRPO that looks at each group of images under several captions. Experimental.

    accelerate launch training_scripts/train_mv_grpo.py --config training_scripts/recipes/mv_grpo_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/mv_grpo.py` (https://arxiv.org/abs/2603.12648).
"""

from diffusers_align.algorithms.flow_grpo import gaussian_kl
from diffusers_align.algorithms.mv_grpo import mv_grpo_loss
from diffusers_align.rl import describe_clip, ratio_diagnostics
from diffusers_align.training import arguments
from diffusers_align.training.advantages import add_group_arguments, advantages_of
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run
from diffusers_align.training.sampling import sample_epoch
from diffusers_align.training.views import decoded, load_views, view_conditions, view_log_probs, view_rewards, write_views


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    add_group_arguments(parser)
    parser.set_defaults(global_std=False)
    group = parser.add_argument_group("MV-GRPO")
    group.add_argument("--views", help=".json or .jsonl file of captions, or a function (prompt, images or None) -> captions: module:function")
    group.add_argument("--num_views", type=int, default=2, help="captions beside the prompt, drawn anew for each group and epoch")
    group.add_argument("--posterior_views", action="store_true", help="hand the group's images to the function: a captioner, no rewriter")
    group.add_argument("--sde_type", default="flow_grpo", choices=["flow_grpo", "dance_grpo", "memoryless", "memoryless_em"])
    group.add_argument("--noise_level", type=float, help="the papers' a or eta; 0.7 for flow_grpo, 0.3 for dance_grpo if absent")
    group.add_argument("--sde_window", type=int, nargs=2, metavar=("FIRST", "END"), help="steps with noise; all if absent")
    group.add_argument("--timestep_fraction", type=float, default=0.99, help="train the first steps only; 0.99 leaves out the last one")
    group.add_argument("--clip_range", type=float, default=1e-4, help="of the ratio per dimension")
    group.add_argument("--kl_beta", type=float, default=0.0, help="weight of the Gaussian KL to the pretrained model, under each view")
    args = arguments.parse(parser, argv)
    args.noise_level = (0.3 if args.sde_type == "dance_grpo" else 0.7) if args.noise_level is None else args.noise_level
    if not args.views:
        parser.error("--views is required (on the command line or in the recipe)")
    if args.num_views < 1:
        parser.error(f"--num_views must be at least 1, got {args.num_views}; without views, train_flow_grpo.py is this algorithm")
    if args.multi_reward != "sum":
        parser.error(f"--multi_reward {args.multi_reward}: for each view there is only the sum of the rewards; leave it out")
    return args


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "MV-GRPO")
    num_batches, batches_a_step = run.batches(args.num_prompts_per_epoch * args.group_size)
    report = Report(run)
    writer = load_views(args.views, report.prompts, args.num_views)
    policy = run.load_policy(sde_type=args.sde_type, noise_level=args.noise_level, sde_window=args.sde_window)
    policy.remember_prompts(max(32, (1 + args.num_views) * num_batches + 2))
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out, and look at the images under every view
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)
        trajectory, images = samples.batches[0], decoded(run, policy, samples)
        last = int(trajectory.num_steps * args.timestep_fraction)
        steps = [k for k in trajectory.noisy_steps if k < max(1, last)]
        dimensions = trajectory.final[0].numel()
        run.explain_once(describe_clip(args.clip_range, dimensions))
        captions = write_views(run, writer, samples, images, epoch)
        rewards = view_rewards(run, report.reward, samples, images, captions)
        conditions = view_conditions(samples, captions)
        old = [view_log_probs(run, policy, trajectory, calls, steps) for trajectory, calls in zip(samples.batches, conditions)]

        # 2 advantages
        advantages = advantages_of(samples, args, report.reward, rewards).to(run.accelerator.device)

        # 3 loss and update
        diagnostics, norms, kls = [], [], []
        for chunk in run.chunks(num_batches, batches_a_step):
            diagnostics.append([])
            weight = run.loss_weight(samples, chunk, len(steps))
            for b, view in [(b, view) for b in chunk for view in range(len(captions))]:
                trajectory, condition, reference = samples.batches[b], conditions[b][view], {}
                advantage, before = advantages[samples.index[b], view], old[b][view]
                if args.kl_beta > 0:
                    with policy.reference(), run.accelerator.autocast():
                        reference = policy.transitions(trajectory, steps, condition)

                def on_step(k, transition):
                    new = transition.log_prob(trajectory.actions[:, k])
                    loss = mv_grpo_loss(new, before[k], advantage, num_views=len(captions), per_dim=dimensions, clip_range=args.clip_range)
                    if args.kl_beta > 0:
                        kl = gaussian_kl(transition.mean, reference[k].mean, transition.std)
                        loss = loss + args.kl_beta * kl / len(captions)
                        kls.append(kl.mean().item())
                    run.accelerator.backward(loss.sum() * weight)
                    diagnostics[-1].append(ratio_diagnostics(new, before[k], args.clip_range, dimensions))

                with run.accelerator.autocast():
                    policy.replay(trajectory, on_step, steps, condition)
            norms.append(run.optimizer_step())
        run.log(run.epoch_metrics(samples, diagnostics, norms, {"kl": kls, "reward/view": [rewards[:, 1:].nanmean().item()]}))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
