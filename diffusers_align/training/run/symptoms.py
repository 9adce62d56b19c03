"""What can keep a run from learning, told by its numbers: what was seen, the likely cause, what to change.

Each rule takes what an epoch showed (`health.Seen`) and yields sentences, or nothing. The order is that of cause and effect: rewards, what is
made of them, the optimizer's steps. Where an earlier rule explains that the weights stand still, later ones keep quiet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

# A replay of the roll-out's own steps must give its log-probabilities: anything above rounding is another computation.
MAX_RATIO_ERROR = 1e-6
# From this share of missing rewards on, it is no matter of single samples.
MANY_MISSING = 0.25
# A preference that is not learned yet may lie above chance for an epoch; and log 2 itself is chance.
PAIR_EPOCHS, PAIR_STEPS, PAIR_SLACK = 3, 20, 0.02


def symptoms_of(seen) -> Iterator[str]:
    """All that the rules find, causes before effects."""
    causes = [text for rule in (_groups, _pairs, _optimizer) for text in rule(seen)]
    yield from causes
    if not causes and not seen.moved:
        yield from _standstill(seen)
    yield from _target(seen)
    yield from _missing(seen)
    yield from _ratio(seen)


def _groups(seen) -> Iterator[str]:
    row, args = seen.row, seen.args
    if row.get("zero_std") != 1.0:
        return
    if getattr(args, "num_samples_per_epoch", None) == 1:
        yield "No advantage (zero_std 1): with --num_samples_per_epoch 1 a sample has no other to be compared with. Take 2 or more."
    else:
        yield (
            f"No signal (zero_std 1): no two rewards that are compared differ (mean {row.get('reward', float('nan')):.4g}). The reward is constant or "
            "too coarse (a threshold, a limit that all reach), does not see what it needs (a missing column, black images), or the images themselves "
            "are equal. Look at samples/, call the reward on two different images, or choose a finer one."
        )


def _pairs(seen) -> Iterator[str]:
    row, args = seen.row, seen.args
    if row.get("pairs") == 0 and row.get("zero_std") != 1.0:
        yield (
            f"No pairs: no two rewards of a prompt differ by more than --min_margin {getattr(args, 'min_margin', 0):g}. "
            "Lower it, or take a larger --group_size."
        )
    if row.get("kept") == 0 and row.get("zero_std") != 1.0:
        yield (
            f"No pairs: at no step do best and worst candidate differ by --threshold {getattr(args, 'threshold', 0):g} in preference (their scaled scores "
            f"differ by {row.get('score_gap', 0):.3g} on average). Raise --score_scale to the scale of logits, lower --threshold, or take more "
            "--num_candidates."
        )


def _optimizer(seen) -> Iterator[str]:
    row, args = seen.row, seen.args
    if row.get("accepted") == 0 and row.get("grad_norm", 0) > 0:
        yield (
            f"No trust-region step was accepted: the line search found none within --max_kl{_given(args, 'max_kl')} that improves the surrogate "
            f"(the last it tried: KL {row.get('kl', 0):.3g}, improvement {row.get('improvement', 0):.3g}). Raise --cg_damping or --cg_iterations, change "
            "--max_kl, or take more samples."
        )
    if seen.skipped and not seen.made:
        yield (
            f"The loss scaler of fp16 skipped all {seen.skipped} optimizer steps: their gradients overflowed. Some at the start are its way of finding a "
            "scale; if it goes on, use --mixed_precision bf16, or scale the loss down (--reward_scale, where the script has it)."
        )
    elif seen.rates and max(seen.rates) == 0 and not seen.moved:
        yield (
            f"The learning rate was 0 in every optimizer step: --lr_scheduler {args.lr_scheduler} with --lr_warmup_steps {args.lr_warmup_steps} begins or "
            "ends there. Make more steps (--num_epochs, a smaller --gradient_accumulation_steps), or use --lr_scheduler constant."
        )


def _given(args: Any, name: str) -> str:
    """A flag's value as it stands behind its name; nothing where it was left to the script."""
    value = getattr(args, name, None)
    return "" if value is None else f" {value:g}"


def _standstill(seen) -> Iterator[str]:
    """No weight has moved although rewards differ and the optimizer has made its steps."""
    row, args = seen.row, seen.args
    if row.get("grad_norm", 0) > 0 and seen.made:
        yield (
            f"No weight has moved although the gradient is not 0 (norm {row['grad_norm']:.3g}): steps of --learning_rate {args.learning_rate:g} with gradients "
            f"cut at --max_grad_norm {args.max_grad_norm:g} are too small to change a weight in float32. Raise what is unusually small "
            "(as a rule 1e-6 to 1e-3, and 1)."
        )
    elif row.get("hinge_inactive") == 1 or getattr(args, "reward_map", None) == "hinge":
        yield (
            f"The gradient is 0: all rewards lie above --reward_target {getattr(args, 'reward_target', None)}, where --reward_map hinge asks for nothing "
            "more. Raise the target."
        )
    elif row.get("grad_norm", 1.0) == 0:
        limits = [f"--{name}" for name in ("adv_clip_max", "clip_range", "loss_clip", "reward_filter") if hasattr(args, name)]
        yield (
            "The gradient is 0 in every step: the loss does not depend on the weights. Look for a limit that cuts everything off"
            + (f" ({', '.join(limits)})" if limits else "")
            + ", a weight of 0, or data whose two sides are equal."
        )


def _target(seen) -> Iterator[str]:
    """Rewards that start beyond what they are to come near: training lowers them."""
    reward, target = seen.row.get("reward", -math.inf), getattr(seen.args, "reward_target", None)
    if getattr(seen.args, "reward_map", None) == "distance" and reward > target:
        yield (
            f"The reward is lowered: its mean, {reward:.4g}, lies above --reward_target {target:g}, and --reward_map distance pulls to the target from either "
            "side. If more is better, give the best possible reward as --reward_target, or --reward_map none."
        )


def _missing(seen) -> Iterator[str]:
    missing = seen.row.get("invalid_rewards", 0)
    if seen.number and missing >= MANY_MISSING * seen.number:
        yield (
            f"{missing:.0f} of {seen.number} rewards ({missing / seen.number:.0%}) are missing (NaN, or the reward failed) and their samples left out. "
            "Repair the reward, or leave out the prompts that it cannot score; they are named above."
        )


def _ratio(seen) -> Iterator[str]:
    error = seen.row.get("ratio_error", 0.0)
    if not error <= MAX_RATIO_ERROR:
        yield (
            f"ratio_error is {error:.2g} and should be 0: before the first update, replayed steps have other log-probabilities than when they were drawn, "
            "which the clip takes for a change of the policy. Look for what differs between the two: dropout or other randomness in the model, kernels that "
            "are not deterministic or depend on the batch, a cache on the denoiser, a pipeline that reads something beside its arguments. "
            "--train_batch_size 1 or --mixed_precision no tell more."
        )


def worse_than_chance(history: list[dict[str, float]], args: Any, made: int) -> str | None:
    """What to say of pairs that are told apart worse than by a fair coin in each of the last epochs of the `history`; nothing before 20 optimizer steps."""
    last = [row["logistic"] for row in history[-PAIR_EPOCHS:] if "logistic" in row]
    # Other losses of pairs (IPO's square, Linear-DPO) do not ask for this one.
    if getattr(args, "loss", "sigmoid") != "sigmoid" or len(last) < PAIR_EPOCHS or made < PAIR_STEPS or not min(last) > math.log(2) + PAIR_SLACK:
        return None
    beta = next((name for name in ("beta", "dspo_beta") if getattr(args, name, None) is not None), None)
    lower = f"--{beta} (now {getattr(args, beta):g}) and --learning_rate (now {args.learning_rate:g})" if beta else "beta and --learning_rate"
    return (
        f"The logistic loss of the pairs ({sum(last) / PAIR_EPOCHS:.3f} over the last {PAIR_EPOCHS} epochs) stays above log 2 = 0.693, which is that of a "
        f"coin: the logits are noise, and large. Divide {lower} by 3 to 10 until it falls below. If it never does, the labels have no pattern that this "
        "model can learn, or winners and losers are swapped (accuracy below 0.5)."
    )
