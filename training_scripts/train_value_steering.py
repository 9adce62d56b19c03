"""Value steering: learn a Q-function over the noise of each step, which picks noises at inference. The model stays as it is.

    accelerate launch training_scripts/train_value_steering.py --config training_scripts/recipes/value_steering_mini_sd.yaml

The algorithm's page is `diffusers_align/algorithms/value_steering.py` (https://arxiv.org/abs/2408.08252 and Q-learning). What comes out, the folder
`value`, is for a `ValueSteeringPipeline`.
"""

from typing import Annotated, ClassVar

from annotated_types import Interval

from diffusers_align.training.flags.common import RunArguments
from diffusers_align.training.flags.methods import NoiseArguments
from diffusers_align.training.flags.model import CallArguments, DecodingArguments, PipelineArguments
from diffusers_align.training.flags.options import Count, NonNegative, Probability, option, parse
from diffusers_align.training.flags.task import TaskArguments

DEFAULTS = {"learning_rate": 1e-3, "adam_weight_decay": 0.01, "num_epochs": 10, "train_batch_size": 16, "num_inference_steps": 10}


class ValueSteeringArguments(NoiseArguments, TaskArguments, PipelineArguments, DecodingArguments, CallArguments, RunArguments, defaults=DEFAULTS):
    """value steering"""

    # No LoRA, and the samples that are judged are drawn as those that the value has learned from.
    shard_denoiser: ClassVar[bool] = False
    gradient_checkpointing: ClassVar[bool] = False
    gradient_accumulation_steps: ClassVar[None] = None
    reward_in_background: ClassVar[bool] = False
    eval_scheduler: ClassVar[str] = "twin"
    eval_num_inference_steps: ClassVar[None] = None
    eval_guidance_scale: ClassVar[None] = None

    num_samples_per_epoch: Count = option(96, "samples per epoch, each of a prompt")
    num_own_epochs: Count = option(2, "first epochs whose samples are the plain sampler's; later ones are steered")
    num_noises: Annotated[int, Interval(ge=1, le=10**6)] = option(16, "to choose from at each step, in steered epochs and in evaluations")
    choice_temperature: NonNegative = option(0.0, "of the choice, in units of the reward; 0 takes the best")
    q_lambda: Probability = option(1.0, "of the targets: 1, what was earned; below 1 the next step's best candidate stands in for part of it")
    value_width: Annotated[int, Interval(ge=1, le=65536)] = option(256, "units of the network's three layers", advanced=True)
    num_updates: Count = option(100, "optimizer steps of an epoch")
    update_batch_size: Count = option(256, "transitions of each", advanced=True)
    replay_size: Count = option(20000, "latest transitions kept", advanced=True)


def parse_args(argv=None):
    """The flags, over the recipe's; exits with a sentence where one makes no sense."""
    return parse(ValueSteeringArguments, argv, __doc__)


if __name__ == "__main__":
    parse_args()  # before the imports that take seconds: what is wrong with the flags is said at once

from dataclasses import replace

import torch

from diffusers_align.algorithms.value_steering import value_loss
from diffusers_align.pipelines.value_steering import NoiseValue, SteeredPolicy, Steering
from diffusers_align.rl.values import explained_variance
from diffusers_align.training.online.sampling import evaluate, noise_fields, sample_epoch
from diffusers_align.training.online.scoring import reward_of_flags
from diffusers_align.training.online.value_replay import Replay, remember
from diffusers_align.training.report import hub, model_card
from diffusers_align.training.report.pictures import before_and_after, samples, save
from diffusers_align.training.report.report import judged_on, trained_on_too
from diffusers_align.training.report.statistics import in_words, mean_and_error
from diffusers_align.training.run.failures import resumable
from diffusers_align.training.run.inputs import columns_of_the_call, condition_of, prompts_of
from diffusers_align.training.run.model_loading import call_arguments, load_pipeline, training_scheduler
from diffusers_align.training.run.run import Run


def load_policy(run, prompts):
    """The pipeline with its SDE twin, and a fresh value of its states, by which it is steered."""
    args, pipeline = run.args, load_pipeline(run.args)
    pipeline.to(run.accelerator.device)
    policy = SteeredPolicy(pipeline, training_scheduler(pipeline, **noise_fields(args)), **call_arguments(args, pipeline))
    policy.remember_prompts(max(32, run.num_batches + 2))
    run.meter.watch(policy.denoisers.values())
    value = NoiseValue.of_policy(policy, condition_of(policy, prompts[:1]), args.value_width)
    if value.config.num_steps != args.num_inference_steps:
        raise ValueError(f"The pipeline takes {value.config.num_steps} steps: say so with --num_inference_steps {value.config.num_steps}.")
    policy.steering = Steering(value, args.num_noises, args.choice_temperature)
    run.train_parameters(list(value.parameters()), lambda folder: value.save_pretrained(folder / "value"))
    return policy


def fit(run, value, replay):
    """`--num_updates` optimizer steps on minibatches of the replay, which are the same on all processes. Returns losses and gradient norms."""
    args, device, losses, norms = run.args, run.accelerator.device, [], []
    for _ in range(args.num_updates if len(replay) else 0):
        states, prompts, steps, targets = (column.to(device) for column in replay.draw(args.update_batch_size))
        loss = value_loss(value(states, prompts, steps), targets).mean()
        run.accelerator.backward(loss / run.accelerator.num_processes)
        norms.append(run.optimizer_step())
        losses.append(float(loss.detach()))
    return losses, norms


def judge(run, policy, rewards, prompts, steered, number=None):
    """Samples at fixed prompts and seeds, steered or the plain sampler's with the same noise, with their rewards."""
    args, now = run.args, policy.steering
    policy.steering = now if steered else None
    try:
        return evaluate(run, _Noisy(policy), rewards, prompts, number or args.num_eval_samples, args.num_validation_images)
    finally:
        policy.steering = now
        policy.worth.clear()
        policy.taken.clear()


class _Noisy:
    """The policy, whose roll-outs have noise also where an evaluation asks for none: there is nothing to pick without."""

    def __init__(self, policy):
        self._policy = policy

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def rollout(self, condition, deterministic=False):
        return self._policy.rollout(condition)


def finish(run, policy, before, after, rewards, judged):
    """Write the value, pictures and model card, and say what was gained."""
    args, results = run.args, {}
    for name in rewards:
        shown = args.reward if name == "reward" else name
        for label, found in (("plain", before), ("steered", after)):
            results[f"{shown}, {label}"] = in_words(found.rewards[name])
        results[f"{shown}, paired gain"] = in_words(after.rewards[name] - before.rewards[name], "+.4f")
    for name, words in results.items():
        run.print(f"{name}: {words}")
    if run.is_main:
        with resumable(run):
            policy.steering.value.save_pretrained(run.output_dir / "value")
            if after.images:
                save(before_and_after(before.images, after.images, after.prompts[: len(after.images)]), run.output_dir / "before_after.png")
            (run.output_dir / "README.md").write_text(card(run, policy, results, judged), encoding="utf-8")
    run.print(f"Value, pictures and model card: {run.output_dir}")


def calling_lines(args, policy, repo):
    """Python that draws as the samples of the card were drawn: with their noise, steps and sizes."""
    noise = {name: policy.scheduler.config[name] for name in noise_fields(args) if name in policy.scheduler.config}
    call = {"num_noises": args.num_noises, "alpha": args.choice_temperature, **policy.call_kwargs}
    words = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={model_card.public(value)!r}" for name, value in call.items()]
    twin = f"sde_twin(pipeline.scheduler, {', '.join(f'{name}={value!r}' for name, value in noise.items())})"
    revision = f" at revision {args.revision}" if args.revision else ""
    return "\n".join([
        *(["from diffusers_align import sde_twin"] if noise else []),
        "from diffusers_align.pipelines import ValueSteeringPipeline",
        "",
        f"pipe = ValueSteeringPipeline(pipeline)  # {model_card.public(args.pretrained_model_name_or_path)}{revision}, loaded",
        f'image = pipe(prompt, value="{repo}", {", ".join([*([f"scheduler={twin}"] if noise else []), *words])}).images[0]',
    ])  # fmt: skip


def card(run, policy, results, judged):
    """The model card."""
    args, repo = run.args, model_card.published_as(run)
    front = model_card.front_matter(args.pretrained_model_name_or_path, ["value-steering"], model_card.pipeline_tag(policy.pipeline))
    base, code = model_card.public(args.pretrained_model_name_or_path), calling_lines(args, policy, repo)
    text = f"A value of half-drawn samples that picks the noise of each step of {base}; the model is unchanged."
    caption = f"Samples of {judged}, steered and the plain sampler's with the same seeds (mean ± standard error):"
    pictures = [name for name in ("before_after.png", "reward_curve.png") if (run.output_dir / name).is_file()]
    return model_card.page(run, front, repo, text, code, caption, results, pictures)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args, "value steering")
    run.batches(args.num_samples_per_epoch, steps=1)
    prompts = prompts_of(run, args.prompts)
    judged = prompts_of(run, args.eval_prompts) if args.eval_prompts else prompts
    rewards = {"reward": reward_of_flags(args, run.accelerator.device)}
    if args.eval_reward:
        rewards[args.eval_reward] = reward_of_flags(args, run.accelerator.device, "eval_")
    run.explain_once(*trained_on_too(args))
    policy = load_policy(run, prompts)
    run.explain_once(*columns_of_the_call([*prompts[:1], *judged[:1]], policy))
    value, replay = policy.steering.value, Replay(args.replay_size, args.seed)
    run.load_optimizer(args.num_epochs * args.num_updates)
    run.register("replay", replay)
    run.resume()
    before = judge(run, policy, rewards, judged, steered=False)
    if args.invalid_rewards == "error":
        before.check_scored(rewards, {"reward": args.reward})
    on = judged_on([prompt.key for prompt in judged[: args.num_eval_samples]], {prompt.key for prompt in prompts})
    run.print(f"Evaluation: {args.num_eval_samples} images of {on}; plain: {args.reward} {in_words(before.rewards['reward'])}")

    for epoch in run.epochs():
        # 1 roll out: the sampler's own noises at first, then those that the value picks
        plan = policy.steering
        policy.steering = replace(plan, follow=epoch >= args.num_own_epochs)
        policy.worth.clear()
        policy.taken.clear()
        drawn = sample_epoch(run, policy, rewards["reward"], prompts, epoch, args.num_samples_per_epoch, None)
        policy.steering = plan

        # 2 targets: until the value has learned anything, what was earned
        targets, worth = remember(replay, policy, drawn, policy.worth, args.q_lambda if epoch else 1.0)
        logged = {}
        logged["advantage_of_best"] = [float((torch.cat(policy.worth) - torch.cat(policy.taken)).mean())]
        logged["explained_variance"] = [explained_variance(targets, worth)]

        # 3 loss and 4 update
        losses, norms = fit(run, value, replay)
        logged["value_loss"] = losses
        run.log(run.epoch_metrics(drawn, [], norms, logged))
        if (epoch + 1) % args.validation_epochs == 0:
            validate(run, policy, rewards, judged, epoch)
    with run.averaged():
        after = judge(run, policy, rewards, judged, steered=True)
        finish(run, policy, before, after, rewards, on)
    if args.push_to_hub and not run.health.failed:
        run.print(f"Pushed to {run.on_main(lambda: hub.push(run))}.")
    run.end()


def validate(run, policy, rewards, judged, epoch):
    """A grid of steered samples at the validation seeds, and their mean reward."""
    with run.averaged(), run.meter.paused():
        now = judge(run, policy, {"reward": rewards["reward"]}, judged, steered=True, number=run.args.num_validation_images)
    run.accelerator.log({"validation/reward": mean_and_error(now.rewards["reward"])[0]}, step=epoch)
    if run.is_main and now.images:
        with resumable(run):
            (run.output_dir / "samples").mkdir(exist_ok=True)
            save(samples(now.images, now.prompts[: len(now.images)]), run.output_dir / "samples" / f"epoch-{epoch + 1:04d}.png")


if __name__ == "__main__":
    main()
