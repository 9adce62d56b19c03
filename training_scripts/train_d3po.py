"""D3PO: align a pipeline by direct preference over trajectories of its own, whose steps have exact log-probabilities.

    accelerate launch training_scripts/train_d3po.py --config training_scripts/recipes/d3po_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/d3po.py` (https://arxiv.org/abs/2311.13231). The reward ranks the images of a prompt, which
makes the pairs. With `--trajectories` those come from a folder that `make_preferences.py --save_trajectories` wrote.
"""

import argparse
from collections import defaultdict

from diffusers_align.algorithms.d3po import CLIPS, d3po_loss, d3po_metrics, sampled_steps
from diffusers_align.rl.matching import error_coefficients
from diffusers_align.rl.preferences import ranked_pairs
from diffusers_align.training import arguments
from diffusers_align.training.preferences import StoredTrajectories, add_noise_arguments, descend, log_probs, noise_fields
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run
from diffusers_align.training.sampling import sample_epoch


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    parser.set_defaults(rank=4, lora_alpha=4, learning_rate=3e-5, num_inference_steps=20, num_epochs=400)
    group = parser.add_argument_group("D3PO")
    group.add_argument("--num_prompts_per_epoch", type=int, default=16, help="groups an epoch")
    group.add_argument("--group_size", type=int, default=7, help="samples of a prompt; 7 in the official code")
    group.add_argument("--same_latent", action=argparse.BooleanOptionalAction, default=True, help="one initial noise a group, as in the official code")
    group.add_argument("--pairs", choices=["all", "extremes"], default="all", help="all pairs of a group (official), or its best and worst image")
    group.add_argument("--min_margin", type=float, default=0.0, help="pairs whose rewards differ by no more are left out")
    group.add_argument("--trajectories", help="learn from those of this folder of make_preferences.py, with its rewards, and sample none")
    group.add_argument("--beta", type=float, default=0.1, help="preference temperature, with log-probabilities per dimension (official)")
    group.add_argument("--clip", choices=CLIPS, default="one_sided", help="what holds steps that went far: see the algorithm's page")
    group.add_argument("--clip_range", type=float, default=0.1, help="of the ratio per dimension (official)")
    group.add_argument("--num_updates_per_epoch", type=int, default=2, help="optimizer steps on an epoch's pairs, each on steps of its own")
    group.add_argument("--num_train_timesteps", type=int, help="solver steps of an update, drawn anew for each; all with noise if absent")
    add_noise_arguments(parser.add_argument_group("noise of the trajectories"))
    args = arguments.parse(parser, argv, ("pretrained_model_name_or_path", "output_dir"))
    if not args.trajectories and not (args.prompts and args.reward):
        parser.error("--prompts and --reward are required, or --trajectories of make_preferences.py")
    if args.trajectories and noise_fields(args):
        parser.error(f"--trajectories come with the noise that they were drawn with: leave out --{', --'.join(noise_fields(args))}")
    if args.num_train_timesteps is not None and args.num_train_timesteps < 1:
        parser.error(f"--num_train_timesteps must be at least 1, got {args.num_train_timesteps}; all steps with noise if absent")
    arguments.check_positive(parser, args, "beta")
    if args.group_size < 2 or args.num_updates_per_epoch < 1:
        parser.error(f"a pair needs --group_size 2 or more and --num_updates_per_epoch 1 or more, got {args.group_size} and {args.num_updates_per_epoch}")
    return args


def update(run, policy, samples, pairs, steps, logged):
    """An optimizer step on `pairs` of samples at `steps`. Returns the gradient's norm."""
    args, (winners, losers) = run.args, pairs
    options = {"per_dim": samples.batches[0].final[0].numel(), "beta": args.beta, "clip": args.clip, "clip_range": args.clip_range}
    own = log_probs(run, policy, samples, steps)
    with policy.reference():
        reference = log_probs(run, policy, samples, steps)

    def loss(own):
        return d3po_loss(own[winners], own[losers], reference[winners], reference[losers], **options)

    value, (coefficients,) = error_coefficients(loss, own)
    descend(run, policy, samples, steps, coefficients)
    logged["loss"].append(value.mean().item())
    for name, number in d3po_metrics(own[winners], own[losers], reference[winners], reference[losers], **options).items():
        logged[name].append(number)
    return run.optimizer_step()


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "D3PO")
    run.batches(args.num_prompts_per_epoch * args.group_size)
    model = {"model": args.pretrained_model_name_or_path, "revision": args.revision, "variant": args.variant}
    stored = StoredTrajectories(args.trajectories, group_size=args.group_size, **model) if args.trajectories else None
    report = Report(run, [{"prompt": prompt.text} for prompt in stored.prompts] if stored else None)
    policy = run.load_policy(**(stored.noise if stored else noise_fields(args)))
    run.load_optimizer(args.num_epochs * args.num_updates_per_epoch)
    run.resume()
    report.start()

    for epoch in run.epochs():
        # 1 trajectories and their rewards
        if stored:
            samples = stored.epoch(run, epoch, args.num_prompts_per_epoch)
        else:
            samples = sample_epoch(run, policy, report.reward, report.prompts, epoch, args.num_prompts_per_epoch, args.group_size, args.same_latent)

        # 2 pairs
        pairs = ranked_pairs(samples.rewards, samples.groups, kind=args.pairs, min_gap=args.min_margin)
        stochastic = samples.batches[0].noisy_steps

        # 3 loss and update
        norms, logged = [], defaultdict(list)
        logged["pairs"].append(len(pairs[0]))
        for number in range(args.num_updates_per_epoch if len(pairs[0]) else 0):
            steps = sampled_steps(stochastic, args.num_train_timesteps or len(stochastic), seed=f"{args.seed}/{epoch}/{number}")
            norms.append(update(run, policy, samples, pairs, steps, logged))
        run.log(run.epoch_metrics(samples, [], norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
