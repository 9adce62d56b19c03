"""A training run: accelerator, optimizer, checkpoints that resume exactly, metrics, trackers. The loop stays in the script."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ...driving.denoisers import denoisers
from ...policy import Policy
from ..checkpoints import checkpoints
from ..checkpoints.allowed_changes import without_secrets
from ..checkpoints.folder_lock import FolderLock
from ..checkpoints.state_adapters import AverageState, OptimizerState, ScheduleState
from ..flags.common import check_output_dir
from ..report import hub
from . import costs, endings, failures, sharding
from .division import Division, divide
from .health import Health
from .kernels import set_up
from .metrics import draw_curve, epoch_metrics, write_history
from .model_loading import call_arguments, load_pipeline, training_scheduler
from .optimizer import adamw, check_average, check_library
from .weight_copies import Averaged, CheckpointedWeights


class Run:
    """State and services of one run. Everything that a resumed run needs is saved by `checkpoint`.

    Attributes:
        history: one dict of metrics an epoch, also in `metrics.jsonl`, and drawn in `reward_curve.png`, last at `curve_drawn` (`time.monotonic`): `rows_drawn`.
        epoch: the next epoch to train.
        meter: counts what the run costs, for `costs.json`.
        registered: what checkpoints hold, by name.
        made_by: the algorithm, flags and commands that a checkpoint keeps; None before `resume`.
        division: which samples of an epoch make which optimizer step and batch; `batches` sets it.
        doing: what is interrupted by a signal, in words; None within the epochs.
        optimizer_steps: those made; what a loss scaler leaves out counts in `skipped_steps` alone.
        rates: learning rates of the epoch's optimizer steps so far.
        finished: whether the script has come to its end, `end`. Before that, its process ends with `exit_status`, or with 1.
        early_stop: ends `epochs` before their number is reached, as soon as it has a reason; None never does.
    """

    def __init__(self, args, algorithm: str):
        self.args, self.algorithm = args, algorithm
        self.output_dir = check_output_dir(args.output_dir)
        self.sharded = sharding.wanted(args.shard_denoiser)
        check_library(args)
        project = ProjectConfiguration(project_dir=str(self.output_dir), logging_dir=str(self.output_dir / checkpoints.LOGS))
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=args.trackers or None, project_config=project)
        self.services, self.doing = ExitStack(), "before training"
        self.services.enter_context(failures.interruptible(weakref.proxy(self)))
        if unlocked := self.on_main(self._lock_folder):
            self.print(unlocked)
        if args.push_to_hub:
            args.hub_model_id = self.on_main(lambda: hub.create(self))
        if args.trackers:
            name = self.on_main(lambda: checkpoints.set_logs_aside(self))
            self.accelerator.init_trackers(name, config={k: without_secrets(str(v)) for k, v in args if k != "hub_token"})
        set_seed(args.seed)
        torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
        self.history: list[dict[str, float]] = []
        self.curve_drawn: float | None = None
        self.rows_drawn = 0
        self.epoch, self.ema, self.optimizer_steps, self.num_batches = 0, None, 0, 0
        self.division: Division | None = None
        self.skipped_steps, self.step_skipped, self.rates = 0, False, []
        self.finished, self.exit_status = False, None
        self.health, self.meter = Health(self), costs.Meter()
        self.early_stop, self.made_by = None, None
        self._explained: set[str] = set()
        self.registered: dict[str, Any] = {}
        self.fresh: dict[str, Callable[[], None] | None] = {}
        self.register("run", self)
        endings.watch(self)

    def _lock_folder(self) -> str | None:
        """Refuse a second run in the output folder. Returns why there is no lock, if so."""
        lock = FolderLock(self.output_dir, without_secrets(self.args.command))
        self.services.callback(lock.release)
        return lock.warning

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def print(self, *values: Any) -> None:
        """On the main process, a line above the progress bars."""
        if self.is_main:
            tqdm.write(" ".join(map(str, values)))

    def explain_once(self, *texts: str) -> None:
        """Print each text the first time that it comes up."""
        for text in texts:
            if text not in self._explained:
                self._explained.add(text)
                self.print(text)

    # --- what is trained -------------------------------------------------------------------------------------------

    def load_policy(self, **sde_fields: Any) -> Policy:
        """The pipeline with the SDE twin of its scheduler and a fresh LoRA."""
        args, pipeline = self.args, load_pipeline(self.args)
        if self.sharded:
            sharding.shard(denoisers(pipeline).values(), self.accelerator.device)
        pipeline.to(self.accelerator.device)
        policy = Policy(pipeline, training_scheduler(pipeline, **sde_fields), **call_arguments(args, pipeline))
        policy.lockstep = self.sharded
        if args.offload_text_encoders:
            policy.offload_text_encoders()
        config = {"target_modules": args.lora_layers.split(",")} if args.lora_layers else {}
        policy.add_lora(args.rank, args.lora_alpha, **config)
        policy.remember_prompts(max(32, self.num_batches + 2))  # each batch of an epoch, and the evaluation's
        for name, module in policy.denoisers.items():
            set_up(args, name, module)
        self.meter.watch(policy.denoisers.values())
        self.policy = policy
        self.train_parameters(policy.trainable_parameters(), lambda folder: policy.save_lora(folder))
        return policy

    def train_parameters(self, parameters: list[torch.nn.Parameter], save: Callable[[Path], None]) -> None:
        """What is optimised, averaged and resumed, in float32, and what writes it to a folder in the form that users load."""
        self.parameters, self.save_weights = parameters, save
        self.health.watch(parameters)
        self.register("weights", CheckpointedWeights(parameters))

    def load_optimizer(self, steps: int) -> None:
        """AdamW over the parameters, a learning-rate schedule of `steps` optimizer steps, and the moving average if asked for.

        Raises:
            ValueError: the average would never begin.
        """
        args, parameters = self.args, self.parameters
        check_average(args, steps)
        optimizer = adamw(args, parameters)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=steps)
        self.register("optimizer", OptimizerState(optimizer))
        self.register("schedule", ScheduleState(self.lr_scheduler))
        if self.accelerator.scaler is not None:
            self.register("loss_scaler", self.accelerator.scaler)
        if args.use_ema:
            self.ema = EMAModel(parameters, decay=args.ema_decay)
            average = AverageState(self.ema)
            self.register("moving_average", average, fresh=lambda: average.start_from(parameters))

    def batches(self, num_samples: int, steps: int = 2) -> tuple[int, int]:
        """How many batches an epoch's samples make on each process, and how many of them make an optimizer step: see `division`.

        Args:
            steps: optimizer steps per epoch where `--gradient_accumulation_steps` does not say; 1 where each is on all samples, or on none of an epoch's own.

        Raises:
            ValueError: the samples do not divide into equal batches.
        """
        accelerator = self.accelerator
        self.division, changed = divide(self.args, num_samples, steps, accelerator.process_index, accelerator.num_processes)
        if changed:
            self.explain_once(changed)
        self.num_batches = len(self.division.batches)
        return self.num_batches, self.division.batches_a_step

    @staticmethod
    def chunks(num_batches: int, batches_a_step: int) -> list[range]:
        """The batches of each optimizer step."""
        return [range(start, min(num_batches, start + batches_a_step)) for start in range(0, num_batches, batches_a_step)]

    def loss_weight(self, samples, chunk: range, num_steps: int) -> float:
        """What makes the sum of per-sample, per-step losses of an optimizer step their mean, over all processes.

        Raises:
            ValueError: there is no step to train.
        """
        if num_steps == 0:
            raise ValueError(
                "No step with noise is left to train: raise the noise or the timestep fraction, or move the SDE window to steps that are taken and trained."
            )
        return 1 / (num_steps * sum(len(samples.batches[b]) for b in chunk) * self.accelerator.num_processes)

    def optimizer_step(self, max_norm: float | None = None) -> float:
        """All-reduce, clip at `max_norm` (`--max_grad_norm` if absent), step, average. Returns the gradient's norm before clipping.

        Gradients are summed by hand: a data-parallel wrapper would hide the denoiser's class from the pipeline. A step that a loss scaler
        skips moves neither the schedule nor the average on.

        Raises:
            FloatingPointError: the gradient is not finite, and there is no loss scaler to skip the step. The weights are untouched.
        """
        parameters = self.parameters
        if self.accelerator.num_processes > 1:
            sharding.sum_over_processes(parameters)
        limit = self.args.max_grad_norm if max_norm is None else max_norm
        norm = self.accelerator.clip_grad_norm_(parameters, limit or math.inf)  # infinity: measured, not clipped
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of optimizer step {self.optimizer_steps + 1} is {float(norm)}; the weights were not touched. Look for a reward or a loss "
                f"that overflows, or lower the learning rate. {failures.how_to_resume(self)}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_skipped = self.optimizer.step_was_skipped  # by the loss scaler: nothing has changed, so nothing moves on
        if self.step_skipped:
            self.skipped_steps += 1
            return float(norm)
        self.rates.append(self.lr_scheduler.get_last_lr()[0])
        self.lr_scheduler.step()
        self.count_update()
        return float(norm)

    def count_update(self) -> None:
        """The parameters have changed: count it, and let the moving average follow."""
        self.optimizer_steps += 1
        if self.ema is not None and self.optimizer_steps % self.args.ema_interval == 0:
            self.ema.step(self.parameters)

    def averaged(self):
        """Context: the moving average in the place of the live weights, if there is one."""
        started = self.ema is not None and self.ema.optimization_step > 0  # before that it is the LoRA that the average began with
        return Averaged(self.ema if started else None, self.parameters)

    # --- epochs, metrics -------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, under a progress bar; a look at the run's health after each, checkpoints on the way and at the end."""
        args = self.args
        self.health.begin()
        bar_style = {"desc": self.algorithm, "unit": "epoch", "disable": not self.is_main}
        self.doing = None
        with self.meter.running(), tqdm(total=args.num_epochs, initial=self.epoch, **bar_style) as bar:
            while self.epoch < args.num_epochs and not self.stopped:
                self.rates.clear()
                yield self.epoch
                self.epoch += 1
                self.health.look()
                bar.update()
                latest, shown = (self.history or [{}])[-1], ("reward", "accuracy", "loss", "ratio_error", "kl")
                bar.set_postfix({name: f"{latest[name]:.3g}" for name in shown if name in latest})
                if self.epoch % args.checkpointing_epochs == 0 or self.epoch == args.num_epochs or self.stopped:
                    draw_curve(self)
                    self.checkpoint()
        self.doing = "after training, before the results were complete"

    @property
    def stopped(self) -> bool:
        """Whether the run has ended before its last epoch."""
        return self.health.hopeless or (self.early_stop is not None and self.early_stop.reason is not None)

    def end(self) -> None:
        """The end of a script, when all files are written.

        Raises:
            SystemExit: with a status other than 0, and the reason in words, where nothing was learned; not with `--allow_no_signal`.
        """
        self.accelerator.end_training()
        self.services.close()
        self.finished = True
        self.health.verdict()

    def epoch_metrics(self, samples, diagnostics: list[list[dict]], norms: list[float], others: dict[str, list[float]]) -> dict[str, float]:
        """What to log of an epoch: see `metrics.epoch_metrics`."""
        return epoch_metrics(self, samples, diagnostics, norms, others)

    def log(self, metrics: dict[str, float]) -> None:
        """Add an epoch's metrics to the history, `metrics.jsonl` and the trackers."""
        row = {"epoch": self.epoch, **{name: float(value) for name, value in metrics.items()}}
        self.history.append(row)
        self.accelerator.log(row, step=self.epoch)
        if self.is_main:
            with failures.resumable(self):
                write_history(self)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def register(self, name: str, state: Any, fresh: Callable[[], None] | None = None) -> None:
        """Make an object part of checkpoints, by its `state_dict` and `load_state_dict`; before `resume`.

        Args:
            name: of its files, such as "value_network".
            fresh: starts it where a checkpoint does not hold it; without, such a checkpoint is refused.
        """
        if name in self.registered:
            raise ValueError(f"Something is registered as {name!r} already.")
        self.registered[name], self.fresh[name] = state, fresh

    def checkpoint(self) -> None:
        """Save everything to `checkpoint-<epoch>`: complete or not at all, so that a kill in between loses nothing.

        Raises:
            OSError: it could not be written; those before it are intact.
        """
        checkpoints.save(self)

    def checkpoints(self) -> list[Path]:
        """Those in the output folder, in order."""
        return checkpoints.found(self.output_dir)

    def resume(self) -> None:
        """Go on from `--resume_from_checkpoint`, if given; call when policy, optimizer and other state are registered.

        Raises:
            FileNotFoundError: the named checkpoint does not exist.
            ValueError: it is of another algorithm, or of other flags that decide what is learned.
            OSError: it is damaged, or the disk is too small for what is still to be written.
        """
        checkpoints.restore(self)
        self.on_main(lambda: failures.check_free_space(self))

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` gives, or raises, on the main process: on all of them, which call this together."""
        result = [None, None]
        if self.is_main:
            try:
                result[0] = function()
            except Exception as error:
                result[1] = error
        value, error = broadcast_object_list(result)
        if error is not None:
            raise error
        return value

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "history": self.history, "optimizer_steps": self.optimizer_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.history, self.optimizer_steps = state["epoch"], list(state["history"]), state["optimizer_steps"]
