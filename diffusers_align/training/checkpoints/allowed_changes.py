"""What a resumed run may change: a checkpoint keeps the flags it was made with, and each flag says what a change of it means.

Its field says so (`resume=` of `training/flags/options.py`). Flags that decide what is learned are refused when they differ, unless
`--allow_changes`, and so are those that say nothing; hyper-parameters of the optimizer take effect, and that is said; flags of the output are free.
The content of the files that a flag names counts with the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ...rewards.contents import content
from ..flags.options import Arguments, Resume, old_names_of, options_of

MADE_BY = frozenset({"algorithm", "flags", "contents", "commands", "samples_a_step", "processes"})


def made_by(run) -> dict[str, Any]:
    """What a checkpoint keeps of how it was made: the algorithm, the flags, what the named files hold, and the command. No token, no password."""
    args, told = dict(run.args), meanings(type(run.args))
    flags = {name: _plain(value) for name, value in args.items() if told.get(name) != "secret"}
    contents = {name: content(value) for name, value in sorted(args.items()) if told.get(name) == "content" and isinstance(value, str)}
    return {
        "algorithm": run.algorithm,
        "flags": flags,
        "contents": {name: value for name, value in contents.items() if value is not None},
        "samples_a_step": run.division.step_size if run.division else args["train_batch_size"] * (args["gradient_accumulation_steps"] or 1),
        "processes": run.accelerator.num_processes,
        "commands": [{"epoch": run.epoch, "command": without_secrets(run.args.command)}],
    }


def meanings(arguments: type[Arguments]) -> dict[str, Resume]:
    """What each flag of a script says of a change."""
    return {name: option.resume for name, option in options_of(arguments).items()}


def _plain(value: Any) -> Any:
    """A flag's value as JSON has it."""
    return json.loads(without_secrets(json.dumps(value, default=str)))


def without_secrets(text: str) -> str:
    """Without passwords and tokens of addresses."""
    text = re.sub(r"://[^/@\s\"']+@", "://***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:token|key|secret|password)[\w-]*=)[^&\s\"']+", r"\1***", text)


# --- comparison ----------------------------------------------------------------------------------------------------------


def compare(before: dict[str, Any], now: dict[str, Any], allow: bool, checkpoint: str, arguments: type[Arguments]) -> list[str]:
    """What is to be said of a run `now` that goes on from a checkpoint made `before`, both as `made_by` gives them.

    Args:
        before: its flags may have the names of the last version.
        now: of this run.
        allow: `--allow_changes`.
        checkpoint: its name.
        arguments: the class of the script's flags.

    Raises:
        ValueError: it is of another algorithm, or what is learned would change and `allow` is not set.
    """
    if before["algorithm"] != now["algorithm"]:
        raise ValueError(
            f"{checkpoint} is of a run of {before['algorithm']}, and this is {now['algorithm']}: resume it with the script that made it "
            f"({before['commands'][-1]['command']}), or choose another --output_dir."
        )
    told, old = meanings(arguments), old_names_of(arguments)
    before = {**before, "flags": old.kept(before["flags"]), "contents": {old.today.get(name, name): value for name, value in before["contents"].items()}}
    watched = any(now["flags"].get(name) is not None for name in ("early_stop_metric", "early_stop_diversity", "early_stop_hacking"))
    refused, effective, free = [], [], []
    for name, text in _changes(before, now):
        meaning = told.get(name, "learned")
        if meaning == "takes effect":
            effective.append(text)
        elif meaning == "free" or (meaning == "measured" and not watched):
            free.append(text)
        elif meaning not in ("unsaid", "secret"):
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
