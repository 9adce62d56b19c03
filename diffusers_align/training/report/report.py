"""The picture and the numbers of a run: sample grids on the way, before and after at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from tqdm.auto import tqdm

from ...lora import stock_lines
from ...rewards.registry import parse_terms
from ..offline.held_out_pairs import HeldOutPairs, margins, trained_on
from ..offline.rows import reading_options
from ..online.sampling import Evaluation, described_solver, evaluate, paired_gain
from ..online.scoring import reward_of_flags
from ..run import failures
from ..run.early_stop import EarlyStop
from ..run.inputs import columns_of_the_call, prompts_of, prompts_of_rows
from . import hub
from .pictures import before_and_after, given_pictures, samples, save
from .sounds import captions_of, noun, write_sounds
from .statistics import in_words, mean_and_error, win_rate


class Report:
    """Evaluates the run's policy at fixed prompts and seeds, before and after, and writes what the user takes home.

    Made before the pipeline is loaded: a reward or a prompt file that does not exist is found at once.

    Args:
        rows: of the data set, where the script learns from one: then `--reward` is optional and only measures, and the prompts are the
            set's unless `--prompts` gives others.

    Attributes:
        reward: the reward that is trained on, or measured; None if there is none.
        prompts: the training prompts.
        judged: the prompts of the evaluation: `--eval_prompts`, or the training ones.
        judged_on: what those are, in words: held-out prompts only if none of them is trained on.
    """

    def __init__(self, run, rows: list[dict] | None = None):
        args, self.run = run.args, run
        self.reward = reward_of_flags(args, run.accelerator.device) if args.reward else None
        self.rewards = {"reward": self.reward} if args.reward else {}
        if args.eval_reward:
            self.rewards[args.eval_reward] = reward_of_flags(args, run.accelerator.device, "eval_")
        run.explain_once(*(trained_on_too(args) if rows is None else ()))
        if args.prompts or rows is None:
            self.prompts = prompts_of(run, args.prompts)
        else:
            self.prompts = prompts_of_rows(rows)
        self.judged = prompts_of(run, args.eval_prompts) if args.eval_prompts else self.prompts
        trained = {prompt.key for prompt in (self.prompts if rows is None else prompts_of_rows(rows))}
        self.judged_on = judged_on([prompt.key for prompt in self.judged[: args.num_eval_samples]], trained)
        held_out_pairs = getattr(args, "eval_dataset_name", None)
        self.pairs = HeldOutPairs(run, held_out_pairs, split=args.eval_dataset_split, **reading_options(args)) if held_out_pairs else None
        self._pairs_are, self._validated, self.preference = self._described_pairs(rows) if self.pairs else "", 0, {}
        self.before: Evaluation | None = None
        self.early_stop = run.early_stop = EarlyStop.of_run(run, self.judged)

    def _described_pairs(self, rows: list[dict]) -> str:
        """What the pairs of `--eval_dataset_name` are, in words: held-out ones only if none of them is trained on."""
        args, number = self.run.args, len(self.pairs)
        same = (args.eval_dataset_name, args.eval_dataset_split) == (args.dataset_name, args.dataset_split)
        known = trained_on(self.pairs.rows, rows)
        if same:  # also where images have no names
            known = max(known, min(number, args.max_rows or number))
        kind = "held-out pairs" if not known else "training pairs" if known == number else f"pairs ({known} of them trained on)"
        return f"{number} {kind}"

    def _evaluate(self, look: Callable[[Evaluation], None] | None = None) -> Evaluation:
        """Of the weights that are in place, all of whose images `look` gets to see."""
        args = self.run.args
        keep = args.num_validation_images if look is None or args.early_stop_diversity is None else args.num_eval_samples
        with tqdm(total=args.num_eval_samples, desc="evaluation", unit="image", disable=not self.run.is_main, leave=False) as bar:
            found = evaluate(self.run, self.run.policy, self.rewards, self.judged, args.num_eval_samples, keep, bar.update)
        if look is not None:
            look(found)
        found.keep(args.num_validation_images)
        return found

    def start(self) -> None:
        """Evaluate the pretrained model."""
        args, run, stop = self.run.args, self.run, self.early_stop
        run.explain_once(*columns_of_the_call([*self.prompts[:1], *self.judged[:1]], run.policy))
        first = stop is not None and stop.seen is None
        with run.policy.reference():
            look = None if stop is None else stop.begin if not first else stop.measure if run.epoch else partial(stop.look, 0)
            self.before = self._evaluate(look)
            self.reference_errors = self.pairs.errors(self.run.policy) if self.pairs else None
        if first and run.epoch:
            run.print(f"The early stop was not asked for before: the first weights that it keeps are those after epoch {run.epoch}.")
            with run.averaged():
                self._evaluate(partial(stop.look, run.epoch))
        if self.rewards:
            self.run.print(f"Evaluation: {args.num_eval_samples} {noun(self.before)} of {self.judged_on}, by {described_solver(args, self.before.solver)}.")
            self.run.print(f"before: {_summary(self.before, args.reward, self.rewards)}")
        if args.invalid_rewards == "error":
            self.before.check_scored(self.rewards, {"reward": args.reward})

    def _preferred(self) -> dict[str, float]:
        """Implicit accuracy and margin of the weights in place on the held-out pairs, if there are any."""
        if self.pairs is None:
            return {}
        found = margins(self.pairs.errors(self.run.policy), self.reference_errors)
        rate, (margin, error) = win_rate(found, 0 * found), mean_and_error(found)
        name, text = f"implicit accuracy on {self._pairs_are}", f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
        self.preference = {name: text}
        self.run.print(f"{name}: {text}, margin {margin:.3g} ± {error:.2g}")
        return {"implicit_accuracy": rate.rate, "implicit_margin": margin}

    def validate(self, epoch: int) -> None:
        """Every `--validation_epochs`: a grid of the first validation prompts at their fixed seeds (and WAV files of sounds), their mean reward, and what
        held-out pairs say.
        An early stop looks at as many images as the evaluation has."""
        args, run = self.run.args, self.run
        if (epoch + 1) % args.validation_epochs:
            return
        with run.averaged(), run.meter.paused():
            if self.early_stop is not None:
                now = self._evaluate(partial(self.early_stop.look, epoch + 1))
            else:
                rewards = {"reward": self.reward} if self.reward else {}
                now = evaluate(run, run.policy, rewards, self.judged, args.num_validation_images, args.num_validation_images)
            found = {name: mean_and_error(values)[0] for name, values in now.rewards.items()} | self._preferred()
            self._validated = epoch + 1
        if self.early_stop is not None and self.early_stop.variety is not None:
            found["diversity"] = self.early_stop.variety
        run.accelerator.log({f"validation/{name}": value for name, value in found.items()}, step=epoch)
        if run.is_main and now.images:
            folder = run.output_dir / "samples"
            picture = samples(now.images, captions_of(now), given_pictures(self.judged, len(now.images)))
            with failures.resumable(run):
                folder.mkdir(exist_ok=True)
                save(picture, folder / f"epoch-{epoch + 1:04d}.png")
                write_sounds(folder / f"epoch-{epoch + 1:04d}", now)
            self._track(picture, epoch)

    def _track(self, picture, step: int) -> None:
        import numpy as np

        for tracker in self.run.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                tracker.log({"samples": wandb.Image(picture)}, step=step)

    def _kept_weights(self):
        """Context: the weights that the run is to leave in the place of the live ones: the best of an early stop, or the average."""
        if self.early_stop is None:
            return self.run.averaged()
        if self.early_stop.seen != self.run.epoch:
            with self.run.averaged():
                self._evaluate(partial(self.early_stop.look, self.run.epoch))
        return self.early_stop.weights.applied()

    def finish(self) -> dict[str, tuple[float, float]]:
        """Evaluate the aligned model; save the LoRA, pictures and the model card; push if asked. Returns (gain, s.e.) by reward."""
        run, args = self.run, self.run.args
        with self._kept_weights():
            after = self._evaluate()
            if self.early_stop is not None or self._validated != run.epoch:  # the last validation was of other weights
                self._preferred()
            if run.is_main:
                with failures.resumable(run):
                    self.run.policy.save_lora(run.output_dir)
        results, gains = {}, {}
        for name, values in self.before.rewards.items():
            if name not in self.rewards:
                continue
            gain, gains[name] = after.rewards[name] - values, paired_gain(values, after.rewards[name])
            results[f"{name}, before"], results[f"{name}, after"] = in_words(values), in_words(after.rewards[name])
            results[f"{name}, paired gain"] = in_words(gain, "+.4f")
        results |= self.preference
        if run.is_main:
            with failures.resumable(run):
                if after.images:
                    given = given_pictures(self.judged, len(after.images))
                    save(before_and_after(self.before.images, after.images, captions_of(after), given=given), run.output_dir / "before_after.png")
                    for name, evaluation in (("before", self.before), ("after", after)):
                        write_sounds(run.output_dir / "sounds" / name, evaluation)
                pictures = [name for name in ("before_after.png", "reward_curve.png") if (run.output_dir / name).is_file()]
                note = self.early_stop.summary() if self.early_stop is not None else ""
                judged_on = f"{self.judged_on}, by {described_solver(args, after.solver)},"
                hub.write_model_card(run, results, pictures, note, judged_on, list(zip(after.prompts, after.images)), after.sampling_rate)
        if self.early_stop is not None:
            run.print(self.early_stop.summary())
        if self.rewards:
            run.print(f"after:  {_summary(after, args.reward, self.rewards)}")
        for name in gains:
            gain = results[f"{name}, paired gain"]
            run.print(f"gain in {args.reward if name == 'reward' else name} on {self.judged_on}: {gain} (paired, s.e.)")
        run.print(f"LoRA, pictures and model card: {run.output_dir}")
        if len(run.policy.denoisers) > 1:
            where = args.hub_model_id if args.push_to_hub else str(run.output_dir)
            run.print("The LoRA has a file for each denoiser. Load them all, into the stock pipeline `pipe`:")
            run.print("\n".join(["  " + line for line in stock_lines(run.policy.pipeline, run.policy.denoisers, where, args.push_to_hub)]))
        if args.push_to_hub and not run.health.failed:  # last: what was found is not lost with the network
            run.print(f"Pushed to {run.on_main(lambda: hub.push(run))}.")
        run.end()
        return gains


def trained_on_too(args) -> list[str]:
    """What to say of an `--eval_reward` that is what the run trains on, or a part of it; nothing of another one."""
    trained, watched = ({name for name, _ in parse_terms(spec)} if spec else set() for spec in (args.reward, args.eval_reward))
    if not trained & watched or args.reward_model != args.eval_reward_model:
        return []
    return [
        f"--eval_reward {args.eval_reward} is trained on: {', '.join(sorted(trained & watched))} is in --reward {args.reward}. So it does not show whether "
        "that is hacked, and no early stop that looks at it does. Give another one."
    ]


def judged_on(judged: Iterable[str], trained: set[str]) -> str:
    """What an evaluation's prompts are, in words: held-out ones only if none of them is trained on."""
    prompts = set(judged)
    known = len(prompts & trained)
    if known == 0:
        return "held-out prompts"
    return "the training prompts" if known == len(prompts) else f"{len(prompts)} prompts ({known} of them trained on)"


def _summary(evaluation: Evaluation, reward: str, asked: Iterable[str]) -> str:
    """The rewards' means on one line; the one that is trained on by its own name."""
    parts = []
    for name, values in evaluation.rewards.items():
        shown = reward + name.removeprefix("reward") if name == "reward" or name.startswith("reward/") and name not in asked else name
        if name in asked:
            parts.append(f"{shown} {in_words(values)}")
        elif not values.isnan().all():  # the parts of a sum and of the scene score may apply to some prompts alone, or to none
            parts.append(f"{shown} {in_words(values[~values.isnan()])}")
    return ", ".join(parts)
