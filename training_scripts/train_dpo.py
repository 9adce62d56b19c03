"""Diffusion-DPO and its relatives: align a pipeline with pairs of images of which one is preferred.

    accelerate launch training_scripts/train_dpo.py --config training_scripts/recipes/dpo_mini_sd3.yaml --dataset_name my_pairs

The algorithms' pages are `diffusers_align/algorithms/{diffusion_dpo,mapo,linear_dpo,diffusion_sdpo,inpo}.py`; docs/preference_data.md
says what the data may look like.
"""

from collections import defaultdict

import torch

from diffusers_align.algorithms.diffusion_dpo import describe_beta, diffusion_dpo_loss, preference_metrics
from diffusers_align.algorithms.diffusion_sdpo import safeguard_scale, scale_gradient
from diffusers_align.algorithms.inpo import inversion_times, invert, inverted_noise
from diffusers_align.algorithms.linear_dpo import linear_dpo_loss
from diffusers_align.algorithms.mapo import mapo_loss
from diffusers_align.training import arguments, offline
from diffusers_align.training.report import Report
from diffusers_align.training.run import Run

BETA = {"mapo": 0.1}  # for the others, by the parametrisation: 5000 for diffusion (official code), 2000 for flow matching (Flow-Factory)


def parse_args(argv=None):
    parser = arguments.base_parser(__doc__.splitlines()[0])
    parser.set_defaults(rank=16, learning_rate=1e-5)
    offline.add_data_arguments(parser)
    group = parser.add_argument_group("Diffusion-DPO")
    group.add_argument("--loss", choices=["sigmoid", "hinge", "ipo", "dmpo", "mapo", "linear"], default="sigmoid", help="DPO's, or a relative's")
    group.add_argument("--beta", type=float, help="preference temperature; 5000 for diffusion, 2000 for flow matching, 0.1 for mapo if absent")
    group.add_argument("--label_smoothing", type=float, default=0.0, help="share of labels that are wrong")
    group.add_argument("--sft_weight", type=float, default=0.0, help="adds so much of the winner's own error")
    group.add_argument("--safeguard_mu", type=float, help="Diffusion-SDPO: share of its progress that the winner keeps (0.9 for SD 1.5, 0.6 for SDXL)")
    group.add_argument("--inversion_steps", type=int, default=0, help="InPO: noise by so many steps of DDIM inversion, in the place of random noise")
    args = arguments.parse(parser, argv, offline.REQUIRED)
    offline.check(parser, args)
    if args.loss in ("mapo", "linear") and (args.label_smoothing or args.sft_weight):
        parser.error(f"--loss {args.loss} has neither --label_smoothing nor --sft_weight")
    if args.safeguard_mu is not None and not 0 <= args.safeguard_mu <= 1:
        parser.error(f"--safeguard_mu must lie in [0, 1], got {args.safeguard_mu}")
    return args


def pair_loss(args, errors, reference, labels):
    """The loss of each pair, (B,)."""
    if args.loss == "mapo":
        return mapo_loss(*errors, beta=args.beta)
    if args.loss == "linear":
        return linear_dpo_loss(*errors, *reference, beta=args.beta)
    return diffusion_dpo_loss(
        *errors, *reference, beta=args.beta, kind=args.loss, label=labels, label_smoothing=args.label_smoothing, sft_weight=args.sft_weight
    )


def noised(args, policy, noising, latents, places, condition):
    """Winner or loser with noise: random and shared, or each image's own by inversion."""
    drawn = noising(latents, places)
    if args.inversion_steps == 0:
        return drawn
    forward, generators = noising.forward, [torch.Generator().manual_seed(place.seed) for place in places]

    def denoise(x, t):
        output = policy.predict(x, t, condition)
        return forward.to_x0(output, x, t), forward.to_noise(output, x, t)

    times = inversion_times(drawn.t, num_steps=args.inversion_steps, clean=forward.clean_timestep)
    with torch.no_grad():
        x_t = invert(latents, times, denoise, lambda t: (forward.alpha(t), forward.sigma(t)), generator=generators)
    return noising.at(latents, x_t, drawn.t, inverted_noise(x_t, latents, forward.alpha(drawn.t), forward.sigma(drawn.t)))


def sides_of(rows, places):
    """Winners, losers, and the probability that the winner is the better one, (B,), with the pairs' weights, (B,)."""
    chosen = [rows[place.row] for place in places]
    images = [(row["image_0"], row["image_1"]) if row["label_0"] >= 0.5 else (row["image_1"], row["image_0"]) for row in chosen]
    labels = torch.tensor([max(row["label_0"], 1 - row["label_0"]) for row in chosen])
    return *zip(*images), labels, torch.tensor([float(row.get("weight", 1.0)) for row in chosen])


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "Diffusion-DPO")
    num_batches, batches_a_step = run.batches(args.num_samples_per_epoch)
    rows = offline.load_rows(run, "pair")
    report = Report(run, rows)
    policy = run.load_policy()
    latent_images, noising = offline.LatentImages(run, policy), offline.Noising(run, policy)
    args.beta = args.beta if args.beta is not None else BETA.get(args.loss, 2000 if noising.forward.is_flow else 5000)
    run.load_optimizer(args.num_epochs * -(-num_batches // batches_a_step))
    run.resume()
    report.start()

    for epoch in run.epochs():
        norms, logged = [], defaultdict(list)
        for chunk, weight in offline.epoch_batches(run, num_batches, batches_a_step):
            for b in chunk:
                # 1 pairs, with the same noise for both
                places = offline.positions(run, len(rows), epoch, b, num_batches)
                winners, losers, labels, weights = sides_of(rows, places)
                condition = policy.condition(offline.captions(args, rows, places))
                latents = [latent_images(images, places, condition) for images in (winners, losers)]
                sides = [noised(args, policy, noising, x0, places, condition) for x0 in latents]
                labels, weights = labels.to(policy.device), weights.to(policy.device)
                if args.loss != "mapo":
                    run.explain_once(describe_beta(args.beta, latents[0][0].numel()))

                # 2 what the pretrained model makes of them
                reference = [side.error(output) for side, output in zip(sides, offline.reference_outputs(run, policy, sides, condition))]

                # 3 loss and update
                def outputs(side):
                    with run.accelerator.autocast():
                        return policy.predict(side.x_t, side.t, condition).float()

                def loss(errors, found):
                    if args.safeguard_mu is not None:
                        residuals = [side.residual(output) for side, output in zip(sides, found)]
                        scale = safeguard_scale(*residuals, mu=args.safeguard_mu)
                        logged["safeguard"].append(scale.mean().item())
                        errors = [errors[0], scale_gradient(errors[1], scale)]
                    return weights * pair_loss(args, errors, reference, labels)

                value, errors, _ = offline.descend(run, loss, outputs, sides, weight)
                logged["loss"].append(value.mean().item())
                for name, number in preference_metrics(*errors, *reference, beta=args.beta).items():
                    logged[name].append(number)
            norms.append(run.optimizer_step())
        run.log(run.epoch_metrics(None, [], norms, logged))
        report.validate(epoch)
    report.finish()


if __name__ == "__main__":
    main()
