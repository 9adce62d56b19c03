"""What a resumed run may change: every flag has its place in one of four lists, and a checkpoint keeps the flags it was made with.

Flags that decide what is learned are refused when they differ, unless `--allow_changes`; hyper-parameters of the optimizer take effect, and
that is said; flags of the output are free. The content of the files that a flag names counts with the name: an edited prompt file is a change,
a moved one is none.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...rewards.registry import parse_terms

# Decide what is learned: a change in the middle makes a run that no flags describe.
LEARNED = frozenset(
    """
    adaptive_weight adjoint adv_clip_max adv_mode attention_head_dim backprop_mode backprop_step bad_rows baseline best_of_n beta
    block_out_channels calibration_increment calibration_rounds calibration_tolerance call_kwargs cfg cg_damping cg_iterations clamp clip clip_mode
    clip_range clip_range_high column_map coupling data data_split dataset_name dataset_split decay divert_start_step dmpo_alpha dspo_beta
    early_stop_diversity early_stop_metric ema_beta error_weighting estimator eta force frames gae_lambda gamma ghuber_power global_std group_size
    guidance_scale height held_out image_root input_columns inversion_steps ipo_tau kl_form label_smoothing lag_decay lambda_d lambda_u last_steps
    layers_per_block linear_eta lora_alpha lora_layers loss loss_clip max_kl max_rows max_weight method min_margin min_std mixed_precision
    multi_reward noise_level num_candidates num_inference_steps num_prompts_per_epoch num_renoised num_samples_per_epoch num_train_timesteps
    num_trained_steps num_updates_per_epoch num_views objective pair_weighting pairs per_prompt_stat_buffer_size per_prompt_stat_min_count
    per_prompt_stat_tracking pixels posterior_views pretrain_dataset_name pretrain_weight pretrained_model_name_or_path
    prompt_column prompts proportion_empty_prompts psi_init random_crop random_flip random_steps random_timestep_fraction rank reference_decay
    reference_point reference_point_decay resolution revision reward reward_filter reward_map reward_model reward_scale reward_target reward_weight
    safeguard_mu same_latent scope score_scale sde_type sde_window sde_window_interval sde_window_size sde_window_strategy seed
    sees_prompt sft_weight shared_timesteps sigma single_file_config skip_last_steps smoothing_copies smoothing_quantile smoothing_std std_ddof stochastic
    temperature threshold ties
    timestep_fraction timestep_scheme top_k top_q trajectories truncation truncation_mean truncation_schedule truncation_std truncation_step
    unwanted_words update use_ema utility value_accumulation_steps value_baseline value_batch_size value_buffer_size variant verify views
    wanted_words weighting weights width window
    """.split()
)
# Take effect from the resumed epoch on, and are said.
TAKES_EFFECT = frozenset(
    """
    adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 early_stop_patience ema_decay ema_interval grad_clip_quantile
    invalid_rewards kl_weight learning_rate lr_scheduler lr_warmup_steps max_grad_norm num_epochs value_learning_rate value_steps
    """.split()
)
# Decide what is measured: free, but part of what is learned where an early stop looks at it.
MEASURED = frozenset(
    """
    eval_dataset_name eval_dataset_split eval_guidance_scale eval_num_inference_steps eval_prompts eval_reward eval_reward_model eval_scheduler
    iterations num_eval_samples outputs solver strength validation_epochs
    """.split()
)
# Change nothing of what is learned or measured. The batch and its accumulation count by their product, `samples_a_step`.
FREE = frozenset(
    """
    allow_changes allow_no_signal cache_dir checkpoint_decoder checkpoint_steps checkpointing_epochs checkpoints_total_limit config gradient_accumulation_steps
    gradient_checkpointing hub_model_id hub_token num_validation_images output_dir push_to_hub report_to resume_from_checkpoint
    reward_in_background reward_retries reward_timeout run_name shard_denoiser train_batch_size two_pass
    """.split()
)
# Differ in every resumed run, so that nobody need be told.
UNSAID = frozenset({"allow_changes", "config", "hub_token", "output_dir", "resume_from_checkpoint"})
CONTENTS = frozenset({"data", "dataset_name", "pretrain_dataset_name", "pretrained_model_name_or_path", "prompts", "reward", "reward_model"})
NOT_FLAGS = frozenset({"command", "trackers", "hub_token"})
MADE_BY = frozenset({"algorithm", "flags", "contents", "commands", "samples_a_step", "processes"})
# A file up to this size counts by its content, a larger one by its size.
READ_BYTES, MAX_FILES, LISTS = 1 << 26, 10_000, (".jsonl", ".csv", ".json", ".txt")


def made_by(run) -> dict[str, Any]:
    """What a checkpoint keeps of how it was made: the algorithm, the flags, what the named files hold, and the command. No token, no password."""
    args = vars(run.args)
    flags = {name: _plain(value) for name, value in args.items() if name not in NOT_FLAGS}
    contents = {name: content(args[name]) for name in sorted(CONTENTS & args.keys()) if isinstance(args[name], str)}
    return {
        "algorithm": run.algorithm,
        "flags": flags,
        "contents": {name: value for name, value in contents.items() if value is not None},
        "samples_a_step": run.division.step_size if run.division else args["train_batch_size"] * (args["gradient_accumulation_steps"] or 1),
        "processes": run.accelerator.num_processes,
        "commands": [{"epoch": run.epoch, "command": without_secrets(run.args.command)}],
    }


def _plain(value: Any) -> Any:
    """A flag's value as JSON has it."""
    return json.loads(without_secrets(json.dumps(value, default=str)))


def without_secrets(text: str) -> str:
    """Without passwords and tokens of addresses."""
    text = re.sub(r"://[^/@\s\"']+@", "://***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:token|key|secret|password)[\w-]*=)[^&\s\"']+", r"\1***", text)


def content(value: str) -> str | None:
    """A hash of what the files hold that a flag's value names: itself a path, or the sum of a reward's terms. None if it names no file.

    Of folders the names and sizes count, and the content of the lists in them (.jsonl, .csv, .json, .txt); of those with very many files the
    lists alone.
    """
    if os.path.exists(value):  # not Path.exists, which raises for what is too long to be a name
        return _hash(Path(value))
    parts = []
    for name, weight in _terms(value):
        path, _, attribute = name.rpartition(":")
        if os.path.exists(path or name):
            parts.append((_hash(Path(path or name)), attribute if path else "", weight))
        else:
            parts.append((name, weight))
    return hashlib.sha256(repr(parts).encode()).hexdigest() if any(len(part) == 3 for part in parts) else None


def _terms(value: str) -> list[tuple[str, float | None]]:
    try:
        return parse_terms(value)
    except ValueError:
        return []


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    if path.is_file():
        _take_in(digest, path)
        return digest.hexdigest()
    files = list(itertools.islice((file for file in path.rglob("*") if file.is_file()), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        files = [file for file in path.iterdir() if file.suffix in LISTS and file.is_file()]
    for file in sorted(files):
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        if file.suffix in LISTS:
            _take_in(digest, file)
    return digest.hexdigest()


def _take_in(digest, file: Path) -> None:
    size = file.stat().st_size
    digest.update(file.read_bytes() if size <= READ_BYTES else str(size).encode())


# --- comparison ----------------------------------------------------------------------------------------------------------


def compare(before: dict[str, Any], now: dict[str, Any], allow: bool, checkpoint: str) -> list[str]:
    """What is to be said of a run `now` that goes on from a checkpoint made `before`, both as `made_by` gives them.

    Raises:
        ValueError: it is of another algorithm, or what is learned would change and `allow` (`--allow_changes`) is not set.
    """
    if before["algorithm"] != now["algorithm"]:
        raise ValueError(
            f"{checkpoint} is of a run of {before['algorithm']}, and this is {now['algorithm']}: resume it with the script that made it "
            f"({before['commands'][-1]['command']}), or choose another --output_dir."
        )
    watched = any(now["flags"].get(name) is not None for name in ("early_stop_metric", "early_stop_diversity"))
    refused, effective, free = [], [], []
    for name, text in _changes(before, now):
        if name in TAKES_EFFECT:
            effective.append(text)
        elif name in FREE or (name in MEASURED and not watched):
            free += [] if name in UNSAID else [text]
        else:
            refused.append(text)
    if refused and not allow:
        raise ValueError(
            f"{checkpoint} was made with other flags, and going on with these would change what is learned in the middle of the run:\n  "
            + "\n  ".join(refused)
            + "\nGive the flags that it was made with, choose another --output_dir for a new run, or pass --allow_changes to go on with these."
        )
    notes = [f"Changed from here on (--allow_changes): {'; '.join(refused)}."] if refused else []
    notes += [f"Takes effect from here on: {'; '.join(effective)}."] if effective else []
    return notes + ([f"Changed without effect on what is learned: {'; '.join(free)}."] if free else [])


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each flag that differs, and a description; flags that only one of both knows are another version's."""
    for name in sorted(before["flags"].keys() & now["flags"].keys()):
        old, new = before["flags"][name], now["flags"][name]
        contents = [made["contents"].get(name) for made in (before, now)]
        if None not in contents:
            if contents[0] == contents[1]:
                continue
            if old == new:
                yield name, f"--{name}: the content of {new} is another one"
                continue
        if old != new:
            yield name, f"--{name} was {_shown(old)}, now {_shown(new)}"
    if before["samples_a_step"] != now["samples_a_step"]:
        yield (
            "samples_a_step",
            f"samples of an optimizer step were {before['samples_a_step']}, now {now['samples_a_step']} "
            f"(--train_batch_size, --gradient_accumulation_steps, {before['processes']} processes then, {now['processes']} now)",
        )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_epochs(run, checkpoint: str) -> None:
    """Refuse a checkpoint that has been trained for longer than is asked for.

    Raises:
        ValueError: it has.
    """
    if run.epoch > run.args.num_epochs:
        earlier = [path.name for path in run.checkpoints() if int(path.name.split("-")[1]) <= run.args.num_epochs]
        name = f"name an earlier one ({', '.join(earlier)})" if earlier else "start anew in another --output_dir"
        raise ValueError(f"{checkpoint} has been trained for {run.epoch} epochs, and --num_epochs is {run.args.num_epochs}: raise it, or {name}.")


# --- what really ran -----------------------------------------------------------------------------------------------------


def history(before: list[dict], now: list[dict], epoch: int) -> list[dict]:
    """The commands that made a run which goes on at `epoch`: those before, as far as something is left of them, and this one."""
    return [made for made in before if made["epoch"] < epoch] + [{**made, "epoch": epoch} for made in now]


def commands(run) -> str:
    """The command that made the run, for its card; where it was resumed, each with the epoch that it went on at."""
    made = (run.made_by or made_by(run))["commands"]
    first, *others = [entry["command"] for entry in made]
    return "\n\n".join([first, *(f"# resumed after epoch {entry['epoch']}\n{command}" for entry, command in zip(made[1:], others))])
