"""What is asked of the model: prompts, rewards, and when to stop."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import model_validator

from .options import Arguments, Count, Positive, option, required


class RetryArguments(Arguments):
    """prompts and reward"""

    reward_retries: Annotated[int, Interval(ge=0, le=10**4)] | None = option(
        None, "further attempts of a reward that asks a server, each after a longer pause; 3 if absent", advanced=True, resume="free"
    )

    @model_validator(mode="after")
    def _check_retries(self):
        flags = (getattr(self, name, None) or [] for name in ("reward", "eval_reward"))
        specs = [spec for value in flags for spec in ([value] if isinstance(value, str) else value)]
        if self.reward_retries is not None and not any(":" in spec or "vlm_judge" in spec for spec in specs):
            asked = " and ".join(specs) or "none"
            raise ValueError(f"--reward_retries is for rewards that ask a server (http://host:port, vlm_judge, one of your own), got {asked}")
        return self


class InvalidRewardArguments(Arguments):
    """prompts and reward"""

    invalid_rewards: Literal["error", "mask"] = option(
        "error", "on rewards that are NaN, raise or hang: stop, or leave their images out", advanced=True, resume="takes effect"
    )
    reward_timeout: Positive | None = option(None, "seconds that a reward may take for a batch; no limit if absent", advanced=True, resume="free")


class OneRewardArguments(RetryArguments):
    """prompts and reward"""

    reward: str = required(
        "built-in reward, module:function, file.py:function, http://host:port, or a sum such as clip_score*1+scene_score*0.5", resume="content"
    )
    reward_model: str | None = option(
        None,
        "checkpoint of the reward's model, where it has one; its public one if absent",
        needs={"reward": True},
        advanced=True,
        resume="content",
        of="reward",
    )


class RewardArguments(OneRewardArguments):
    """prompts and reward"""

    eval_reward: str | None = option(None, "a second reward, not trained on, to show whether the first was hacked", resume="measured")
    eval_reward_model: str | None = option(
        None, "checkpoint of the second reward's model", needs={"eval_reward": True}, advanced=True, resume="measured", of="eval_reward"
    )


class PromptArguments(Arguments):
    """prompts and reward"""

    prompts: str = required("a .txt, .jsonl or .csv file, or a shipped set", resume="content")
    prompt_column: str = option("prompt", "field of the prompt in .jsonl and .csv files; rewards get the other fields", advanced=True)
    input_columns: list[str] | None = option(
        None,
        "columns that the pipeline's call takes one of a sample, COLUMN or ARGUMENT=COLUMN: image mask_image=mask; strings are files, if not texts",
        advanced=True,
    )
    picture_columns: list[str] | None = option(
        None, "further columns that hold pictures, for rewards alone, such as mask: files, relative to the prompt file", advanced=True
    )

    @model_validator(mode="after")
    def _check_input_columns(self):
        if self.input_columns is not None:
            from ...data.inputs import parse_input_columns

            handed = parse_input_columns(self.input_columns).values()
            if twice := sorted(set(handed) & set(self.picture_columns or ())):
                raise ValueError(f"--picture_columns names {', '.join(twice)}, which rewards get by --input_columns already: leave it out there")
        return self


class TaskArguments(PromptArguments, RewardArguments, InvalidRewardArguments):
    """prompts and reward"""

    eval_prompts: str | None = option(None, "held-out prompts; the training ones if absent", resume="measured")
    num_eval_samples: Count = option(64, "images of the evaluation before and after", advanced=True, resume="measured")


class EarlyStopArguments(Arguments):
    """early stop"""

    early_stop_metric: Literal["reward", "eval_reward"] | None = option(
        None, "stop when this held-out reward rises no more, and keep the weights of its peak", advanced=True
    )
    early_stop_patience: Count = option(
        3,
        "after so many validations (--validation_epochs) without a new peak",
        needs={"early_stop_metric": True},
        advanced=True,
        resume="takes effect",
    )
    early_stop_diversity: Annotated[float, Interval(gt=0, lt=1)] | None = option(
        None, "stop below this share of the pretrained model's diversity (RMS of pixels within prompts)", advanced=True
    )
    early_stop_hacking: Annotated[float, Interval(gt=0, le=1000)] | None = option(
        None,
        "stop when --eval_reward, which is not trained on, lies below the pretrained model's by more than so many standard errors of the paired difference; "
        "3 is a sure sign",
        needs={"eval_reward": True},
        advanced=True,
    )

    @model_validator(mode="after")
    def _check_early_stop(self):
        if self.early_stop_metric and not getattr(self, self.early_stop_metric):
            raise ValueError(f"--early_stop_metric {self.early_stop_metric} needs --{self.early_stop_metric}")
        return self
