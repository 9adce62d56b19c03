"""Diffusion-DPO and its relatives: align a pipeline with pairs of images of which one is preferred.

    accelerate launch training_scripts/train_dpo.py --config training_scripts/recipes/dpo_mini_sd3.yaml --dataset_name my_pairs

The algorithms' pages are `diffusers_align/algorithms/{diffusion_dpo,mapo,linear_dpo,diffusion_sdpo,inpo}.py`; docs/preference_data.md
says what the data may look like, docs/why_is_my_loss_069.md what to expect of the first epochs.
"""

from collections import defaultdict

import torch

from diffusers_align.algorithms.diffusion_dpo import describe_beta, diffusion_dpo_loss, preference_metrics
from diffusers_align.algorithms.diffusion_sdpo import safeguard_scale, scale_gradient
from diffusers_align.algorithms.inpo import inversion_times, invert, inverted_noise
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss, linear_weight
from diffusers_align.algorithms.mapo import mapo_loss, mapo_margin
from diffusers_align.policy import noise_seed
from diffusers_align.training import arguments, data_arguments, offline
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run

# Diffusion, flow matching: official codes of Diffusion-DPO and Linear-DPO (SD 1.5, SD3), Flow-Factory's DPO, MaPO's for SDXL.
BETA = {"mapo": (0.1, 0.1), "linear": (100, 1000), "dpo": (5000, 2000)}
LINEAR_ETA = (1e-3, 0.05)
LINEAR_REFERENCE_DECAY = 0.99  # the official recipes'


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    parser.set_defaults(rank=16, learning_rate=1e-5)
    data_arguments.add_data_arguments(parser)
    data_arguments.add_pair_arguments(parser)
    group = parser.add_argument_group("Diffusion-DPO")
    group.add_argument("--loss", choices=["sigmoid", "hinge", "ipo", "dmpo", "mapo", "linear"], default="sigmoid", help="DPO's, or a relative's")
    group.add_argument("--beta", type=float, help="preference temperature; if absent 5000 for diffusion, 2000 for flow matching; linear 100, 1000; mapo 0.1")
    group.add_argument("--ipo_tau", type=float, default=0.5, help="IPO aims at the logit 1 / (2 tau); 0.5 is our choice, a preference of 73 %%")
    group.add_argument("--dmpo_alpha", type=float, default=0.01, help="DMPO aims at logit(1 - alpha) (official: 0.01)")
    group.add_argument("--linear_eta", type=float, help="Linear-DPO's least weight; if absent 0.001 for diffusion (SD 1.5; SDXL 0), 0.05 for flow matching")
    group.add_argument("--label_smoothing", type=float, default=0.0, help="share of labels that are wrong")
    group.add_argument("--sft_weight", type=float, default=0.0, help="adds so much of the winner's own error")
    group.add_argument("--safeguard_mu", type=float, help="Diffusion-SDPO, pair by pair: share of its progress that the winner keeps (SD 1.5 0.9, SDXL 0.6)")
    group.add_argument("--inversion_steps", type=int, default=0, help="InPO: noise by so many steps of DDIM inversion, in the place of random noise")
    group.add_argument(
        "--reference_decay", type=float, help="the reference follows the model with this decay; 0: it stays. Linear-DPO 0.99, others 0 if absent"
    )
    args = arguments.parse(parser, argv, data_arguments.REQUIRED)
    data_arguments.check(parser, args)
    check(parser, args)
    if args.loss == "linear" and args.reference_decay is None:
        args.reference_decay = LINEAR_REFERENCE_DECAY
    return args


def check(parser, args):
    """Exit with a message on values that make no sense."""
    if args.loss in ("mapo", "linear") and (args.label_smoothing or args.sft_weight):
        parser.error(f"--loss {args.loss} has neither --label_smoothing nor --sft_weight")
    if args.loss == "mapo" and args.reference_decay is not None:
        parser.error("--loss mapo has no reference, so --reference_decay means nothing")
    arguments.check_positive(parser, args, "beta", "ipo_tau", "dmpo_alpha")
    for name, high in (("safeguard_mu", 1), ("reference_decay", 1), ("label_smoothing", 0.5), ("linear_eta", 0.5), ("dmpo_alpha", 0.5)):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= high:
            parser.error(f"--{name} must lie in [0, {high:g}], got {getattr(args, name)}")
    for name in ("inversion_steps", "sft_weight"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must not be negative, got {getattr(args, name)}")


def pair_loss(args, errors, ref_errors, labels):
    """The loss of each pair, (B,). MaPO and Linear-DPO, which know no labels, take one of p as the pair and its opposite, weighted p and 1 - p."""
    if args.loss == "mapo":
        return labels * mapo_loss(*errors, beta=args.beta) + (1 - labels) * mapo_loss(*errors[::-1], beta=args.beta)
    if args.loss == "linear":
        options = {"beta": args.beta, "eta": args.linear_eta}
        return labels * linear_dpo_loss(*errors, *ref_errors, **options) + (1 - labels) * linear_dpo_loss(*errors[::-1], *ref_errors[::-1], **options)
    options = {"label": labels, "label_smoothing": args.label_smoothing, "sft_weight": args.sft_weight}
    options |= {"ipo_tau": args.ipo_tau, "dmpo_alpha": args.dmpo_alpha}
    return diffusion_dpo_loss(*errors, *ref_errors, beta=args.beta, kind=args.loss, **options)


def pair_metrics(args, errors, ref_errors, labels):
    """What is logged of a batch; without a reference, the margin is MaPO's."""
    metrics = preference_metrics(*errors, *ref_errors, beta=args.beta, label=labels)
    if args.loss == "mapo":
        own = {name: metrics[name] for name in ("accuracy", "error_w", "error_l") if name in metrics}
        return own | {"margin": mapo_margin(*errors).mean().item()}
    if args.loss == "linear":
        metrics["linear_weight"] = linear_weight(*errors, *ref_errors, beta=args.beta, eta=args.linear_eta).mean().item()
    return metrics


def inverted(run, policy, noising, x0, places, condition):
    """InPO: each image at the state that the sampler would come from, at the same time as the other's."""
    drawn, forward = noising(x0, places, condition), noising.forward
    generators = [torch.Generator().manual_seed(noise_seed(place.seed, "inversion")) for place in places]

    def denoise(x, t):
        output = policy.predict(x, t, condition)
        return forward.to_x0(output, x, t), forward.to_noise(output, x, t)

    times = inversion_times(drawn.t, num_steps=run.args.inversion_steps, clean=forward.clean_timestep)
    with torch.no_grad(), run.accelerator.autocast():
        x_t = invert(x0, times, denoise, lambda t: (forward.alpha(t), forward.sigma(t)), generator=generators)
    return noising.at(x0, x_t, drawn.t, inverted_noise(x_t, x0, forward.alpha(drawn.t), forward.sigma(drawn.t)), condition)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Diffusion-DPO")
    num_batches, batches_a_step = run.batches(args.num_samples_per_epoch)
    rows = offline.load_rows(run, "pair")
    report = Report(run, rows)
    policy = offline.load_policy(run)
    examples, reference = offline.Examples(run, policy, rows), offline.Reference(run, policy, args.reference_decay or None)
    noising = examples.noising
    if args.beta is None:
        args.beta = BETA.get(args.loss, BETA["dpo"])[noising.forward.is_flow]
    if args.linear_eta is None:
        args.linear_eta = LINEAR_ETA[noising.forward.is_flow]
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    run.resume()
    report.start()

    for epoch in run.epochs():
        norms, logged = [], defaultdict(list)
        for chunk, weight in offline.epoch_batches(run, num_batches, batches_a_step):
            for b in chunk:
                # 1 pairs, with the same noise for both
                places = examples.positions(epoch, b)
                condition, (images, labels, weights) = examples.condition(places), offline.pairs_of(rows, places, policy.device)
                latents = [examples.latents(side, places, condition) for side in images]
                if args.inversion_steps:
                    sides = [inverted(run, policy, noising, x0, places, condition) for x0 in latents]
                else:
                    sides = [noising(x0, places, condition) for x0 in latents]

                # 2 what the pretrained model makes of them
                if args.loss != "mapo":
                    run.explain_once(describe_beta(args.beta, latents[0][0].numel()))
                    reference(*sides)
                ref_errors = [side.ref_error for side in sides]

                # 3 loss and update
                def loss(winner, loser):
                    errors = [winner.error, loser.error]
                    if args.safeguard_mu is not None:
                        residuals = [side.residual(own.output) for side, own in zip(sides, (winner, loser))]
                        scale = safeguard_scale(*residuals, mu=args.safeguard_mu, per_sample=True)
                        logged["safeguard"].append(scale.mean().item())
                        errors[1] = scale_gradient(loser.error, scale)
                    return weights * pair_loss(args, errors, ref_errors, labels)

                value, found = offline.descend(run, policy, loss, sides, weight, args.two_pass)
                logged["loss"].append(value.mean().item())
                for name, number in pair_metrics(args, [own.error for own in found], ref_errors, labels).items():
                    logged[name].append(number)
            norms.append(run.optimizer_step())
            reference.follow()
        run.log(run.epoch_metrics(None, [], norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
