"""ReFL: align a pipeline with a differentiable reward of the clean sample predicted in mid-denoising.

    accelerate launch training_scripts/train_refl.py --config training_scripts/recipes/refl_mini_sd3.yaml

The algorithm's page is `diffusers_align/algorithms/refl.py` (https://arxiv.org/abs/2304.05977). The paper's loss on captioned
images, which the official code leaves out, is added by `--pretrain_dataset_name`.
"""

from collections import defaultdict

from diffusers_align.algorithms.refl import middle_step
from diffusers_align.differentiable import differentiable_rollout
from diffusers_align.training import arguments
from diffusers_align.training import reward_gradients as shared
from diffusers_align.training.pretraining import Pretraining
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    shared.add_arguments(parser)
    # Official (THUDM/ImageReward, ReFL.py): 40 steps without guidance, max(0, 2 - r) / 1000 of a normalised reward.
    parser.set_defaults(num_inference_steps=40, guidance_scale=1.0, reward_map="hinge", reward_scale=1e-3, adam_weight_decay=1e-2)
    group = parser.add_argument_group("ReFL")
    group.add_argument("--window", type=float, nargs=2, default=(0.75, 0.975), metavar=("FIRST", "LAST"), help="where to predict, in fractions of the chain")
    args = arguments.parse(parser, argv)
    if args.reward_map == "hinge" and args.reward_target is None:
        args.reward_target = 2.0
    shared.check(parser, args)
    if not 0 <= args.window[0] <= args.window[1] <= 1:
        parser.error(f"--window must be two fractions in order within [0, 1], got {args.window}")
    return args


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "ReFL")
    batches = run.batches(args.num_samples_per_epoch)
    report, pretraining = Report(run), Pretraining(run)
    policy = shared.load_policy(run)
    clip = shared.GradientClip(run)
    run.load_optimizer(args.num_epochs * -(-batches[0] // batches[1]))
    run.resume()
    num_steps = shared.check_reward(run, policy, report)
    report.start()

    for epoch in run.epochs():
        logged, norms = defaultdict(list), []
        for update in shared.updates_of_epoch(run, policy, report, epoch, *batches):
            k = middle_step(num_steps, update.generator, window=tuple(args.window))
            for batch in update.batches:
                with run.accelerator.autocast():
                    # 1 differentiable roll-out
                    rollout = differentiable_rollout(policy, batch.condition, grad_steps=[k], stop_step=k, **shared.rollout_options(args))

                    # 2 reward and loss
                    rewards = batch.reward(rollout.images.float())
                    loss = shared.total_loss(policy, rollout, shared.reward_loss(rewards, args), args, logged)

                # 3 update
                run.accelerator.backward(shared.scored_sum(loss) * update.weight)
                logged["reward"] += shared.finite(rewards)
                if args.reward_map == "hinge":
                    logged["hinge_inactive"] += [float(r >= args.reward_target) for r in shared.finite(rewards)]
            logged["step"].append(k)
            pretraining.descend(policy, epoch, update.numbers, logged)
            norms.append(clip.step())
        run.log(run.epoch_metrics(None, [], norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
