"""DRaFT and its relatives: align a pipeline with a differentiable reward by its gradient through sampling.

    accelerate launch training_scripts/train_draft.py --config training_scripts/recipes/draft_mini_sd3.yaml

The algorithms' pages are `diffusers_align/algorithms/{draft,drtune,srpo}.py`, and `continuous_adjoint.py` for `--adjoint`.
"""

from collections import defaultdict

import torch

from diffusers_align.algorithms import draft, drtune, srpo
from diffusers_align.differentiable import differentiable_rollout
from diffusers_align.training import arguments, renoised_samples
from diffusers_align.training import reward_gradients as shared
from diffusers_align.training.pretraining import Pretraining
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run

METHODS = ("draft", "draft_k", "draft_lv", "drtune", "srpo")


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    # The paper prints no table of learning rate, rank and batch: AlignProp's, https://arxiv.org/abs/2310.03739.
    parser.set_defaults(rank=4, lora_alpha=4, num_inference_steps=50, learning_rate=1e-3)
    shared.add_arguments(parser)
    group = parser.add_argument_group("DRaFT")
    group.add_argument("--method", choices=METHODS, default="draft_k", help="all steps; the last ones; the last one on several noises; spaced; any level")
    group.add_argument("--truncation", type=int, default=1, help="draft_k: number of last steps with gradient")
    group.add_argument("--num_renoised", type=int, default=2, help="draft_lv: how often a sample is noised and denoised anew")
    group.add_argument("--num_trained_steps", type=int, default=5, help="drtune: evenly spaced steps with gradient")
    group.add_argument("--early_stop", type=int, default=0, help="drtune: leave out at most so many of the last steps, drawn")
    group.add_argument("--wanted_words", default="Realistic photo of", help="srpo: what comes before the prompt in the text to move towards")
    group.add_argument("--unwanted_words", default="CG render of", help="srpo: and in the text to move away from")
    group.add_argument("--adjoint", action="store_true", help="draft, draft_k: gradients step by step from stored states, for one-step solvers")
    args = arguments.parse(parser, argv)
    if args.method == "srpo" and args.reward_map == "none":
        args.reward_map, args.reward_target = "hinge", 0.7  # official, on normalised HPS
    shared.check(parser, args)
    if args.adjoint and (args.method not in ("draft", "draft_k") or args.kl_weight or args.stochastic or args.mixed_precision == "fp16"):
        parser.error("--adjoint is for --method draft and draft_k along an ODE, without --kl_weight, --stochastic and fp16")
    if args.method == "srpo" and args.kl_weight:
        parser.error("--method srpo trains no step of the roll-out, so there is none to hold with --kl_weight")
    return args


def choices(args, num_steps, generator):
    """Which steps of the roll-out carry gradient."""
    if args.method == "srpo":
        return {"grad_steps": [], "decode": False}
    if args.method == "drtune":
        steps, stop = drtune.grad_steps(num_steps, generator, number=args.num_trained_steps, early_stop=args.early_stop)
        return {"grad_steps": steps, "stop_step": stop, "detach_input": True}
    return {"grad_steps": draft.grad_steps(num_steps, {"draft": None, "draft_k": args.truncation, "draft_lv": 1}[args.method])}


def scored_loss(args, policy, report, batch, rollout, k, logged):
    """The loss (B,) of a roll-out's rewards; `k` is SRPO's step."""
    if args.method == "srpo":
        denoised, inverted = renoised_samples.aligned_images(policy, rollout, k, **shared.checkpoint_options(args))
        words, number = (args.wanted_words, args.unwanted_words), len(renoised_samples.noising_times(policy, rollout))
        rewards = shared.relative_rewards(report, batch, denoised, words, float(srpo.discounts(number)[k]), args)
        penalty = shared.relative_rewards(report, batch, inverted, words[::-1], float(srpo.discounts(number, inversion=True)[k]), args)
        logged["penalty"] += shared.finite(penalty)
        loss = shared.reward_loss(rewards, args) + shared.reward_loss(penalty, args)
    else:
        rewards = batch.reward(rollout.images.float())
        losses = [shared.reward_loss(rewards, args)]
        if args.method == "draft_lv":
            again = renoised_samples.renoised_images(policy, rollout, args.num_renoised, **shared.checkpoint_options(args))
            losses += [shared.reward_loss(batch.reward(images), args) for images in again]
        loss = torch.stack(losses).mean(0)
    logged["reward"] += shared.finite(rewards)
    return loss


def adjoint_update(args, run, policy, update, num_steps, logged):
    """The continuous adjoint in the place of the roll-out's graph."""
    truncation = len(draft.grad_steps(num_steps, None if args.method == "draft" else args.truncation))
    for batch in update.batches:
        rewards, mismatch = shared.adjoint_backward(run, policy, batch, truncation, update.weight)
        logged["reward"] += shared.finite(rewards)
        logged["mismatch"].append(mismatch)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "DRaFT")
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
            chosen = choices(args, num_steps, update.generator)
            drawn = float(torch.rand((), generator=update.generator))
            if args.adjoint:
                adjoint_update(args, run, policy, update, num_steps, logged)
            for batch in update.batches if not args.adjoint else ():
                with run.accelerator.autocast():
                    # 1 differentiable roll-out
                    rollout = differentiable_rollout(policy, batch.condition, **shared.rollout_options(args), **chosen)
                    levels = renoised_samples.alignable_steps(policy, rollout) if args.method == "srpo" else [0]

                    # 2 reward and loss
                    loss = scored_loss(args, policy, report, batch, rollout, levels[int(drawn * len(levels))], logged)
                    loss = shared.total_loss(policy, rollout, loss, args, logged)

                # 3 update
                run.accelerator.backward(shared.scored_sum(loss) * update.weight)
            if args.method == "drtune":
                logged["stop_step"].append(chosen["stop_step"])
            pretraining.descend(policy, epoch, update.numbers, logged)
            norms.append(clip.step())
        run.log(run.epoch_metrics(None, [], norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
