"""What belongs to samples one by one beside their prompts (`--input_columns`): from the flag to the pipeline's call, in batches of equal sizes."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ...checks.given_names import fetched
from ...condition import Condition
from ...data.inputs import Inputs, has_pictures, opened, parse_input_columns, sizes_of
from ...data.prompts import Prompt, load_prompts
from ...policy import Policy
from .model_loading import model_source
from .modular_loading import is_modular, modular_parameters
from .single_file import is_single_file


def inputs_of(args) -> Inputs | None:
    """What `--input_columns` and `--picture_columns` ask for; None where both are absent. The model is not loaded for it.

    Raises:
        ValueError: the call of the model's pipeline has no such argument.
    """
    size, pictures = (args.height, args.width) if args.height and args.width else None, tuple(getattr(args, "picture_columns", None) or ())
    if not getattr(args, "input_columns", None):
        return Inputs({}, size=size, pictures=pictures) if pictures else None
    columns, accepted = parse_input_columns(args.input_columns), call_parameters(args)
    if accepted is not None and (unknown := [name for name in columns if name not in accepted]):
        raise ValueError(
            f"--input_columns: the call of {args.pretrained_model_name_or_path} has no {', '.join(unknown)}; it takes {', '.join(accepted)}. Load the model as "
            "a pipeline whose call has: diffusers' class for the task, saved once with its save_pretrained, as --pretrained_model_name_or_path."
        )
    words = frozenset(name for name in columns if (_takes_text(name, accepted[name]) if accepted is not None else "prompt" in name))
    return Inputs(columns, words, size, pictures)


def prompts_of(run, source: str) -> list[Prompt]:
    """The prompts of a file or a shipped set, with what the flags say belongs to each.

    Raises:
        FileNotFoundError, ValueError: as `load_prompts`, or their pictures have several sizes.
    """
    prompts = load_prompts(source, run.args.prompt_column, inputs_of(run.args), run.print)
    check_one_size(prompts, source)
    return prompts


def columns_of_the_call(prompts: Sequence[Prompt], policy: Policy) -> list[str]:
    """That prompts have columns of the names of the call's arguments which are not handed to it, in words; nothing where there are none."""
    taken = [(name, {*prompt.inputs, *policy.call_kwargs}) for prompt in prompts for name in prompt.columns if name in policy.parameters]
    found = dict.fromkeys(name for name, handed in taken if name not in handed)
    if not found:
        return []
    names, one = " ".join(found), len(found) == 1
    return [
        f"The prompt file has the column{'' if one else 's'} {', '.join(found)}, and the call of {type(policy.pipeline).__name__} takes arguments so named: "
        f"rewards alone get {'it' if one else 'them'}. --input_columns {names} hands {'it' if one else 'them'} to the pipeline as well."
    ]


def call_parameters(args) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of the call of the model's pipeline, from its index; None where diffusers has no such class, and of a single file, which has no index.

    Raises:
        FileNotFoundError, ValueError: there is no such model, as in `load_pipeline`.
    """
    name = args.pretrained_model_name_or_path
    if is_single_file(name):
        return None
    source = model_source(name)
    with fetched(name):
        if is_modular(source, args.revision):
            return modular_parameters(source, args.revision)
        config = DiffusionPipeline.load_config(source, revision=args.revision)
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    return None if cls is None else {name: p for name, p in inspect.signature(cls.__call__).parameters.items() if name != "self"}


def _takes_text(name: str, parameter: inspect.Parameter) -> bool:
    """By its annotation: stock pipelines annotate all of theirs. Blocks may say no type; then by the name."""
    if parameter.annotation in (None, inspect.Parameter.empty):
        return "prompt" in name
    words = re.findall(r"\w+", str(parameter.annotation))
    return "str" in words and "Image" not in words


def condition_of(policy: Policy, asked: Sequence[Prompt | str], **options: Any) -> Condition:
    """The call for these prompts with what belongs to each, its pictures read now. `options` are those of `Policy.condition`."""
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in asked]
    if asked[0].inputs:
        options["per_sample"] = {name: [opened(prompt.inputs[name]) for prompt in asked] for name in asked[0].inputs}
    return policy.condition([prompt.text for prompt in asked], **options)


def prompts_of_rows(rows: Sequence[dict]) -> list[Prompt]:
    """The different tasks of a data set: its prompts, each with what the pipeline gets beside it."""
    return list({prompt.key: prompt for prompt in map(prompt_of, rows)}.values())


def prompt_of(row: dict, text: str | None = None) -> Prompt:
    """A row of preference data as the task that its images were made for; `text` in the place of its prompt."""
    inputs = row.get("inputs", {})
    return Prompt(row["prompt"] if text is None else text, dict(inputs), inputs)


def check_one_size(prompts: Sequence[Prompt], source: str, who: str = "Training") -> None:
    """Samples of one batch need pictures of one size, or each would depend on its neighbours; losses and distances that count dimensions
    need it in all batches. `who` is it that does.

    Raises:
        ValueError: there are several.
    """
    sizes = Counter(sizes_of(prompt.inputs) for prompt in prompts if prompt.inputs)
    if len(sizes) > 1:
        listed = "; ".join(f"{_words(size)} ({number} rows)" for size, number in sizes.most_common(5)) + (" ..." if len(sizes) > 5 else "")
        raise ValueError(
            f"--input_columns: the pictures of {source} have {len(sizes)} sizes: {listed}. {who} takes one: give --height and --width, to which they "
            "are then resized (aspect kept, the overhang cropped), or resize the files."
        )


def check_moved_together(args, rows: Sequence[dict], source: str) -> None:
    """What is cropped or mirrored at random is the data set's own images: the pictures that the pipeline gets beside them would stay where they are.

    Raises:
        ValueError: both are asked for.
    """
    flags = [f"--{name}" for name in ("random_crop", "random_flip") if getattr(args, name, False)]
    if flags and any(has_pictures(row.get("inputs", {})) for row in rows[:1]):
        raise ValueError(
            f"{' and '.join(flags)} would move the images of {source}, and not the pictures of --input_columns that belong to them, so that a model would "
            "learn to move what it is given. Leave it out; for more rows than there are, add copies to the data set with all pictures of a row moved alike."
        )


def _words(sizes: tuple) -> str:
    def word(size: Any) -> str:
        return f"{size[0]}x{size[1]}" if size and isinstance(size[0], int) else f"[{', '.join(map(word, size))}]" if size else "none"

    return ", ".join(f"{name} {word(size)}" for name, size in sizes if size is not None)


def batches_by_size(asked: Sequence[Prompt], batch_size: int, rank: int = 0, world: int = 1, even: bool = True) -> list[list[int]]:
    """The positions among `asked` that process `rank` of `world` takes, in batches whose pictures have one size.

    Where there is one size, the samples are dealt out one by one. `even`: all processes get the same number of batches, some of them samples
    again: with a sharded denoiser, one without a batch would leave the others waiting.
    """
    number, sizes = len(asked), [sizes_of(prompt.inputs) for prompt in asked]
    if len(set(sizes)) <= 1:
        mine = [i % number for i in range(rank, -(-number // world) * world if even else number, world)]
        return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    groups: dict[tuple, list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    batches = [group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)]
    return [batches[i % len(batches)] for i in range(rank, -(-len(batches) // world) * world if even else len(batches), world)]
