"""DDPO: align a diffusion pipeline with any reward by policy gradients (score function or importance sampling).

    accelerate launch training_scripts/train_ddpo.py --config training_scripts/recipes/ddpo_mini_sd.yaml

The algorithm's pages are `diffusers_align/algorithms/ddpo.py` and `reinforce.py` (https://arxiv.org/abs/2305.13301). With
`--update trpo` an epoch is one trust-region step instead of clipped gradient steps (`diffusers_align/rl/trust_region.py`).
"""

import random

from diffusers_align.algorithms.ddpo import ddpo_loss
from diffusers_align.algorithms.reinforce import reinforce_loss
from diffusers_align.rl import PromptStatistics, batch_advantages, describe_clip, ratio_diagnostics
from diffusers_align.training import arguments
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run
from diffusers_align.training.sampling import sample_epoch
from diffusers_align.training.trust_region import trust_region_update


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    parser.set_defaults(rank=4, lora_alpha=4, num_inference_steps=50, guidance_scale=5.0)
    group = parser.add_argument_group("DDPO")
    group.add_argument("--estimator", choices=["is", "sf"], default="is", help="importance sampling, or the score function (one step an epoch)")
    group.add_argument("--num_samples_per_epoch", type=int, default=256)
    group.add_argument("--eta", type=float, default=1.0, help="noise of the DDIM kernel")
    group.add_argument("--timestep_fraction", type=float, default=1.0, help="share of the steps that is trained, drawn for each batch")
    group.add_argument("--clip_range", type=float, default=1e-4, help="of the ratio per dimension")
    group.add_argument("--adv_clip_max", type=float, default=5.0)
    group.add_argument("--per_prompt_stat_tracking", action=arguments.argparse.BooleanOptionalAction, default=True)
    group.add_argument("--per_prompt_stat_buffer_size", type=int, default=32)
    group.add_argument("--per_prompt_stat_min_count", type=int, default=16)
    group.add_argument("--update", choices=["adamw", "trpo"], default="adamw", help="trpo: one trust-region step an epoch, without learning rate and clip")
    group.add_argument("--max_kl", type=float, default=0.05, help="trpo: KL of a step in nats a trajectory, summed over steps and dimensions")
    group.add_argument("--cg_iterations", type=int, default=10, help="trpo: products with the Fisher matrix; each costs three replays")
    group.add_argument("--cg_damping", type=float, default=0.1, help="trpo: added to the Fisher matrix's diagonal")
    args = arguments.parse(parser, argv)
    if args.update == "trpo" and args.mixed_precision == "fp16":
        parser.error("--update trpo does not scale its gradients, which underflow in fp16: use --mixed_precision bf16")
    if args.update == "trpo" and args.timestep_fraction < 1:
        parser.error("--update trpo bounds the KL of whole trajectories: leave --timestep_fraction at 1")
    return args


def trained_steps(trajectory, args, epoch, batch):
    """The stochastic steps, or a random share of them, in order."""
    steps = trajectory.noisy_steps
    number = min(len(steps), max(1, round(len(steps) * args.timestep_fraction)))
    return sorted(random.Random(f"{args.seed}/{epoch}/{batch}/steps").sample(steps, number))


def gradient_steps(run, policy, samples, advantages, args, epoch, chunks):
    """An optimizer step for each of `chunks` of batches. Returns the epoch's metrics."""
    dimensions = samples.batches[0].final[0].numel()
    run.explain_once(describe_clip(args.clip_range, dimensions))
    diagnostics, norms = [], []
    for chunk in chunks:
        diagnostics.append([])
        for b in chunk:
            trajectory, advantage = samples.batches[b], advantages[samples.index[b]]
            steps = trained_steps(trajectory, args, epoch, b)
            weight = run.loss_weight(samples, chunk, len(steps))

            def on_step(k, transition):
                old, new = trajectory.log_probs[:, k], transition.log_prob(trajectory.actions[:, k])
                if args.estimator == "sf":
                    loss = reinforce_loss(new, advantage, per_dim=dimensions)
                else:
                    loss = ddpo_loss(new, old, advantage, per_dim=dimensions, clip_range=args.clip_range)
                run.accelerator.backward(loss.sum() * weight)
                diagnostics[-1].append(ratio_diagnostics(new, old, args.clip_range, dimensions))

            with run.accelerator.autocast():
                policy.replay(trajectory, on_step, steps)
        norms.append(run.optimizer_step())
    return run.epoch_metrics(samples, diagnostics, norms, {})


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DDPO")
    num_batches, batches_a_step = run.batches(args.num_samples_per_epoch)
    report = Report(run)
    policy = run.load_policy(eta=args.eta)
    if args.estimator == "sf":
        batches_a_step = num_batches
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    statistics = PromptStatistics(args.per_prompt_stat_buffer_size, args.per_prompt_stat_min_count)
    run.accelerator.register_for_checkpointing(statistics)
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 roll out
        samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_samples_per_epoch, 1)

        # 2 advantages
        if args.per_prompt_stat_tracking:
            advantages = statistics.update(samples.prompts, samples.rewards)
        else:
            advantages = batch_advantages(samples.rewards)
        advantages = advantages.clamp(-args.adv_clip_max, args.adv_clip_max).to(run.accelerator.device)

        # 3 loss and update
        if args.update == "trpo":
            limits = {"max_kl": args.max_kl, "cg_iterations": args.cg_iterations, "cg_damping": args.cg_damping}
            metrics = samples.metrics() | trust_region_update(run, policy, samples, advantages, **limits)
        else:
            metrics = gradient_steps(run, policy, samples, advantages, args, epoch, run.chunks(num_batches, batches_a_step))
        run.log(metrics)
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
