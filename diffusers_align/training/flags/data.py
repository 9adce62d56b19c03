"""The flags of scripts that learn from a data set."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .common import TrainingArguments
from .options import Arguments, Count, Probability, option, required


class ColumnArguments(Arguments):
    """data"""

    column_map: str | None = option(None, "its columns, where they have other names: prompt=caption,image_0=left")

    @model_validator(mode="after")
    def _check_column_map(self):
        if self.column_map:
            from ...data import parse_column_map

            parse_column_map(self.column_map)
        return self


class SourceArguments(ColumnArguments):
    """data"""

    dataset_name: str = required("a .jsonl, .csv or .parquet file, a folder, or a set of the Hub", resume="content")
    dataset_split: str = option("train", "its split")
    image_root: str | None = option(None, "folder of relative image paths; the file's own if absent", advanced=True)


class BadRowArguments(Arguments):
    """images"""

    bad_rows: Literal["skip", "error"] = option("skip", "broken rows: report and leave out, or stop", advanced=True)


class ImageArguments(BadRowArguments):
    """images"""

    verify: Literal["full", "header", "none"] = option("full", "decode each image before training, read its header, or neither", advanced=True)
    max_rows: Count | None = option(None, "read the first so many rows only", advanced=True)
    random_crop: bool = option(False, "crop at random, both images of a pair alike; centred otherwise", advanced=True)
    random_flip: bool = option(False, "mirror at random, both images of a pair alike", advanced=True)
    proportion_empty_prompts: Probability = option(0.1, "share of captions that are emptied, which keeps guidance working", advanced=True)
    cache_dir: str | None = option(
        None, "keep latents and encoded prompts on disk here; encoded at every use if absent. Not with --random_crop", advanced=True, resume="free"
    )

    @model_validator(mode="after")
    def _check_cache(self):
        if self.cache_dir and self.random_crop:
            raise ValueError("--cache_dir with --random_crop would keep every crop and use none twice: leave out one of them")
        return self


class ImageNoiseArguments(Arguments):
    """noise"""

    timestep_scheme: Literal["uniform", "logit_normal"] | None = option(None, "logit_normal for flow matching, uniform for diffusion if absent", advanced=True)
    error_weighting: Literal["native", "eps", "x0", "elbo"] = option("native", "errors in the model's own terms, or converted", advanced=True)


class NoisedImageArguments(ImageArguments, ImageNoiseArguments):
    """How a data set's rows are read, its images prepared and noised."""


# Whoever trains from data has no roll-outs: what is said of sampling is for pictures and the evaluation.
EVALUATION = {"num_inference_steps", "guidance_scale", "eval_reward", "eval_prompts"}


class HeldOutArguments(Arguments):
    """data"""

    eval_dataset_name: str | None = option(
        None, "held-out pairs, read as the data set is, for the implicit accuracy; none if absent", advanced=True, resume="measured"
    )
    eval_dataset_split: str = option("train", "their split", needs={"eval_dataset_name": True}, advanced=True, resume="measured")


class DataArguments(SourceArguments, HeldOutArguments, NoisedImageArguments, TrainingArguments, advanced=EVALUATION, basic={"cache_dir"}):
    """data"""

    num_samples_per_epoch: Count = option(1024, "rows per epoch: the stretch between two lines of the log")
    prompts: str | None = option(None, "a .txt, .jsonl or .csv file, or a shipped set, for the pictures and the evaluation; the data set's if absent")
    reward: str | None = option(
        None, "for the evaluation: built-in, module:function, file.py:function, http://host:port, or a sum such as clip_score*1+scene_score*0.5"
    )

    @model_validator(mode="after")
    def _check_columns_of_prompt_files(self):
        if self.prompt_column != "prompt" and not (self.prompts or self.eval_prompts):
            raise ValueError(
                f"--prompt_column {self.prompt_column} is for prompt files, and there is none: the data set's captions are read from its column prompt, or "
                f"another one by --column_map prompt={self.prompt_column}"
            )
        if self.picture_columns and not (self.prompts or self.eval_prompts):
            raise ValueError(
                "--picture_columns are read from prompt files, and there is none: of the data set's rows rewards get the columns of --input_columns alone. "
                "Give --prompts or --eval_prompts, or leave it out"
            )
        return self


class PairArguments(Arguments):
    """pairs"""

    ties: Literal["drop", "soft", "keep"] = option("drop", "pairs without a winner: leave out, label 1/2, or one of each label", advanced=True)
    pair_weighting: Literal["row", "prompt"] = option("row", "weights as the rows have them, or summing to 1 for each prompt", advanced=True)
    two_pass: bool = option(False, "errors first, then gradients side by side: the same update with half the memory", advanced=True, resume="free")
