"""Every flag of every script: its range is declared, refused where it is left, and somebody reads it."""

import ast
import functools
import math
import os
import re
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
from annotated_types import Ge, Gt, Le, Lt

from diffusers_align.files.paths import folder
from diffusers_align.training.flags.options import Arguments, parse
from diffusers_align.training.flags.options import options_of as flags_of

PACKAGE, SCRIPTS = Path(__file__).parents[3] / "diffusers_align", folder("training_scripts")
STEMS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
# Flags that are given together or not at all.
PARTNERS = [("step_aware", "pretrained_model_name_or_path"), ("pretrained_model_name_or_path", "step_aware")]
READ_AS = {"report_to": "trackers"}
EXTREMES = ["nan", "inf", "-inf", "-1", "0", "1e30", str(10**12), ""]


def halves(stem):
    """The source of a script up to where it has read its flags, and the rest."""
    lines = (SCRIPTS / f"{stem}.py").read_text().splitlines()
    (first, *_) = (node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))
    return "\n".join(lines[: first.lineno - 1]), "\n".join(lines[first.end_lineno :])


@functools.cache
def arguments_of(stem) -> type[Arguments]:
    """The class of a script's flags, without the imports of what it trains."""
    module = types.ModuleType(f"flags_of_{stem}")
    sys.modules[module.__name__] = module  # where pydantic looks names up
    exec(compile(halves(stem)[0], stem, "exec"), vars(module))
    (name,) = re.findall(r"return parse\((\w+), argv, __doc__\)", halves(stem)[0])
    return getattr(module, name)


def words(name, value):
    return [f"--{name}={value}"]


def given(options, name, have=()):
    """A valid value of a flag with what it needs, as words; `have` are those that are there already."""
    option = options[name]
    found = {} if name in have else {name: sample(option)}
    for other, wanted in option.needs.items():
        more = given(options, other, (*have, name))
        if wanted is not True:
            wanted = next(value for value in wanted if value is not None) if isinstance(wanted, tuple) else wanted
            more[other] = [f"--{'' if wanted else 'no-'}{other}"] if isinstance(wanted, bool) else words(other, wanted)
        found = {**more, **found}
    for one, other in PARTNERS:
        if one in found and other in options and not options[one].is_required:
            found = {other: sample(options[other]), **found}
    return found


def sample(option):
    kind = option.kind
    if kind.is_flag:
        return [f"--{option.name}"]
    if kind.is_number:
        inner = next(value for value in (0.25, 2, 1, 0.6, 50) if value in kind and kind.type(value) == value)
        return [f"--{option.name}", *[str(kind.type(inner))] * (kind.length or 1)]
    text = {"column_map": "prompt=text"}.get(option.name, "text")
    return words(option.name, kind.choices[0] if kind.choices else '{"extra": 1}' if kind.type is dict else text)


def required(stem, options):
    """What a script cannot do without."""
    together = {"d3po": ["--prompts=p", "--reward=r"], "pfm": ["--pretrained_model_name_or_path=text"]}
    found = {name: sample(option) for name, option in options.items() if option.is_required or name == "reward"}
    return found | {word.split("=")[0][2:]: [word] for word in together.get(stem.removeprefix("train_"), [])}


def outcome(stem, flags, capsys):
    """The arguments, or what is printed instead of them."""
    try:
        return parse(arguments_of(stem), [word for own in flags.values() for word in own]), ""
    except SystemExit as exit:
        assert exit.code == 2
        return None, capsys.readouterr().err


def refused_as_it_should_be(option, value, said):
    return f"--{option.name} must be {option.kind.describe}, got {value}" in said


def number(option, text):
    """What the text says, where the flag's type can hold it; NaN where it cannot."""
    try:
        return option.kind.type(float(text)) if option.kind.type(float(text)) == float(text) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def edges(kind):
    """The numbers at the ends of a range, and those just outside."""
    step = 1 if kind.type is int else 0.0
    for bound in kind.bounds:
        limit = next(iter(vars(bound).values())) if hasattr(bound, "__dict__") else getattr(bound, type(bound).__name__.lower())
        down, up = (limit - 1, limit + 1) if step else (math.nextafter(limit, -math.inf), math.nextafter(limit, math.inf))
        yield from ((limit, down) if isinstance(bound, (Ge, Gt)) else (limit, up))


def test_numbers_say_their_range():
    for stem in STEMS:
        for name, option in flags_of(arguments_of(stem)).items():
            assert option.text, f"{stem}: --{name} says nothing of itself"
            if option.kind.is_number:
                sides = {type(bound) for bound in option.kind.bounds}
                assert sides & {Ge, Gt} and sides & {Le, Lt}, f"{stem}: --{name} has no range"
                assert option.kind.range in option.help()
                default = option.default if isinstance(option.default, (list, tuple)) else [option.default]
                assert option.is_required or all(value is None or value in option.kind for value in default), f"{stem}: --{name}"


def walk(stem, capsys):
    """Every flag of a script with every extreme and edge. Returns how many flags and how many values, accepted and refused."""
    counts, options = {"flags": 0, "accepted": 0, "refused": 0}, flags_of(arguments_of(stem))
    for name, option in options.items():
        base = {**required(stem, options), **given(options, name)}
        counts["flags"] += not option.kind.is_flag
        if option.kind.is_number:
            several = option.kind.length or 1
            texts = [*EXTREMES, *(repr(value) for value in edges(option.kind))] if several == 1 else [text for text in EXTREMES if text[:1] != "-"]
            for text in texts:
                args, said = outcome(stem, {**base, name: words(name, text) if several == 1 else [f"--{name}", *[text] * several]}, capsys)
                inside = number(option, text) in option.kind
                shown = " ".join([text or "''"] * several)
                if args is not None:
                    assert inside, f"{stem}: --{name} {text!r} was accepted outside {option.kind.range}"
                elif inside:  # it contradicts another flag, and is named
                    assert f"--{name}" in said, f"{stem}: --{name} {text!r}: {said}"
                else:
                    assert refused_as_it_should_be(option, shown, said), f"{stem}: --{name} {text!r}: {said}"
                counts["accepted" if args is not None else "refused"] += 1
        elif not option.kind.is_flag and name != "config":
            for text in ("",) if option.kind.type is str and not option.kind.choices else ("", "nan", "-1"):
                if not option.kind.may_be_empty:
                    args, said = outcome(stem, {**base, name: words(name, text)}, capsys)
                    assert args is None and f"--{name} must be " in said, f"{stem}: --{name} {text!r}: {said}"
                    counts["refused"] += 1
    return counts


def test_every_flag_of_every_script_is_walked(capsys):
    found = {stem: walk(stem, capsys) for stem in STEMS}
    total = {key: sum(counts[key] for counts in found.values()) for key in ("flags", "accepted", "refused")}
    with capsys.disabled():
        print(f"\n{len(found)} scripts: {total['flags']} flags with values walked, {total['refused']} values refused, {total['accepted']} valid")
    assert len(found) == len(STEMS) >= 22 and all(counts["flags"] > 15 and counts["refused"] > 60 for counts in found.values())


def test_valid_values_are_taken_with_what_they_need(capsys):
    for stem in STEMS:
        options = flags_of(arguments_of(stem))
        for name in options.keys() - {"config"}:
            args, said = outcome(stem, {**required(stem, options), **given(options, name)}, capsys)
            assert args is not None or " go together" in said or f"--{name}" in said and "has no effect" not in said, f"{stem}: --{name}: {said}"


def test_what_has_no_effect_is_refused(capsys):
    """Each flag that needs another, without it."""
    number = 0
    for stem in STEMS:
        options = flags_of(arguments_of(stem))
        for name, option in options.items():
            base, unmet = required(stem, options), {}
            args, _ = outcome(stem, base, capsys)
            for other, wanted in option.needs.items():
                value = getattr(args, other)
                met = bool(value) if wanted is True else value in (wanted if isinstance(wanted, tuple) else (wanted,))
                unmet |= {} if met else {other: wanted}
            if unmet and sample(option)[-1] not in ("0", "0.0"):
                args, said = outcome(stem, {**base, name: sample(option)}, capsys)
                number += 1
                assert args is None and f"--{name}" in said and ("has no effect" in said or " go together" in said), f"{stem}: --{name}: {said}"
    assert number > 200


# args.NAME, "NAME", and names that are put together: f"value_{n}", f"{prefix}reward_model".
READ, STARTS, ENDS = r"\bargs\.(\w+)|[\"'](\w+)[\"']", r'getattr\(args, f"(\w+_)\{', r'getattr\(args, f"\{\w+\}(\w+)"'


@functools.cache
def sources():
    """All code of the package that acts on flags."""
    return "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.parent.name != "flags")


@functools.cache
def read_by_the_package():
    return {one or other for one, other in re.findall(READ, sources())}


@pytest.mark.parametrize("stem", STEMS)
def test_every_flag_is_read_by_some_code(stem):
    own = halves(stem)[1]
    read, ends = read_by_the_package() | {one or other for one, other in re.findall(READ, own)}, tuple(re.findall(ENDS, sources()))
    for name in flags_of(arguments_of(stem)).keys() - {"config"}:
        parts = {READ_AS.get(name, name), *(name.removeprefix(start) for start in re.findall(STARTS, own) if name.startswith(start))}
        assert parts & read or name.endswith(ends), f"{stem}: nobody reads --{name}"


@pytest.mark.parametrize(
    "script, words, needed",
    [
        ("train_dpok", ["--gae_lambda=0"], "--advantage gae"),
        ("train_dpok", ["--ema_decay=0"], "--use_ema"),
        ("train_vader", ["--backprop_step=0"], "--backprop_mode specific"),
        ("train_alignprop", ["--truncation_schedule=uniform", "--truncation_std=0"], "--truncation_schedule gaussian"),
        ("train_draft", ["--unwanted_words="], "--method srpo"),
        ("train_draft", ["--lr_warmup_steps=0", "--eta=0", "--pretrain_weight=0", "--skip_last_steps=0"], None),  # what is absent may be said to be
        ("train_flow_grpo", ["--no-share_prefix", "--scout_pool=0"], None),
    ],
)
def test_a_nothing_in_the_place_of_a_number_is_refused_where_it_has_no_effect(script, words, needed, capsys):
    base = ["--pretrained_model_name_or_path=m", "--prompts=p", "--reward=r", "--output_dir=o"]
    args, said = outcome(script, {"base": base, "words": words}, capsys)
    if needed is None:
        assert args is not None
    else:
        assert args is None and f"{words[-1].partition('=')[0]} has no effect without {needed}: leave it out" in said


def test_a_flag_that_the_recipe_voids_by_itself_is_refused_and_one_that_is_overridden_is_said(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    base = {"base": ["--pretrained_model_name_or_path=m", "--prompts=p", "--reward=r", "--output_dir=o", f"--config={recipe}"]}
    recipe.write_text("max_kl: 0.1\n")
    args, said = outcome("train_ddpo", base, capsys)
    assert args is None and f"--max_kl has no effect without --update trpo: leave it out, or give both; got 0.1 (in {recipe}, line 1)" in said
    recipe.write_text("max_kl: 0.1\nupdate: trpo\n")
    assert outcome("train_ddpo", base, capsys)[0].max_kl == 0.1
    args, _ = outcome("train_ddpo", {**base, "update": ["--update=adamw"]}, capsys)
    assert args.max_kl is None
    assert "--max_kl 0.1" in capsys.readouterr().err


MOST_COMMON, MOST_OWN = 25, 12


def test_the_first_screen_of_help_is_short(capsys):
    """At most 25 common flags and 12 of the script's own, of whatever it has."""
    lines, long = [], []
    for stem in STEMS:
        options = flags_of(arguments_of(stem)).values()
        first = [option for option in options if not option.advanced]
        common, own = (sum(option.is_common is kind for option in first) for kind in (True, False))
        lines.append(f"{stem:24} {common:2} common, {own:2} own, {len(options) - len(first):2} advanced")
        long += [stem] if common > MOST_COMMON or own > MOST_OWN else []
        assert all(not option.advanced for option in options if option.is_required), f"{stem}: what is required is on the first screen"
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert not long, f"{long}: mark what few runs need as advanced"


def meaning(option):
    """The type, and what the help says first, before an example or a default."""
    return option.kind.type, option.kind.choices, option.kind.length, re.split(r"[;:(]", option.text)[0].strip()


# Names whose meaning depends on the script, and why they keep the one name.
ONE_NAME = {
    "beta": "each preference loss has a temperature of its own, in the paper's name",
    "clip_range": "of the ratio that each loss clips",
    "eta": "DDIM's eta, where it is chosen and where it is not",
    "kl_form": "each objective has KL forms of its own",
    "kl_weight": "of the distance that each objective holds the model by",
    "lora": "evaluate.py compares several",
    "loss": "each family's losses",
    "num_epochs": "train_reward.py rolls nothing out",
    "num_eval_samples": "train_pfm.py judges given outputs",
    "num_inference_steps": "train_pfm.py's are those of its own flow",
    "num_prompts_per_epoch": "groups where there are groups, single samples where not",
    "advantage": "what it is measured against is each method's",
    "num_samples_per_epoch": "samples are rows, paths, or prompts' one image",
    "num_train_timesteps": "timesteps of the forward process, or steps of stored trajectories",
    "pairs": "the choices' names are those of each method",
    "min_margin": "make_preferences.py keeps what differs by just as much",
    "prompts": "train_pfm.py only looks rewards' columns up by them",
    "random_timestep_fraction": "drawn for each epoch, DDPO's for each batch",
    "timestep_fraction": "of the steps, or of the grid where samples are noised",
    "rank": "train_reward.py adapts the reward, where 0 is none",
    "reward": "evaluate.py takes several",
    "reward_model": "evaluate.py takes several",
    "reward_scale": "Adjoint Matching's lambda is a number of nats",
    "same_latent": "of a group or of a prompt's images",
    "sde_type": "each method allows kernels of its own",
    "ties": "train_reward.py cannot keep both labels",
    "timestep_scheme": "of images' noise, or of the sampler's own grid",
    "train_batch_size": "train_reward.py makes a step of each batch",
}


def test_what_happens_without_a_flag_is_said_once():
    """A class's own default takes the place of what its parent says of an absent flag."""
    helps = {(stem, name): option.help() for stem in STEMS for name, option in flags_of(arguments_of(stem)).items()}
    assert not [where for where, text in helps.items() if "if absent" in text and "default: " in text]
    assert helps["train_ddpo", "guidance_scale"].endswith("rollouts, replays and evaluation (a number from 0 to 1000; default: 5)")
    assert "the pipeline's default if absent (" in helps["train_flow_grpo", "guidance_scale"]
    assert "half an epoch" not in helps["train_draft", "gradient_accumulation_steps"]
    assert "half an epoch's" in helps["train_dpo", "gradient_accumulation_steps"]


def test_one_name_means_one_thing():
    """Fields of one name are of one class, or have the same type and the same words, or are excused above; and they mean the same to a resumed run."""
    found = defaultdict(list)
    for stem in STEMS:
        for name, option in flags_of(arguments_of(stem)).items():
            found[name].append((stem, option))
    several = {}
    for name, uses in found.items():
        if len({option.owner for _, option in uses}) > 1 and len({meaning(option) for _, option in uses}) > 1:
            several[name] = sorted({f"{stem}: {option.text}" for stem, option in uses})
        trained = [(stem, option) for stem, option in uses if "Run(args" in halves(stem)[1]]
        assert len({option.resume for _, option in trained}) <= 1, f"--{name}: { ({stem: option.resume for stem, option in trained}) }"
    assert {name: texts for name, texts in several.items() if name not in ONE_NAME} == {}
    assert set(ONE_NAME) <= set(several), "excuses that nobody needs"


COLD = """
import runpy, sys, time
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as exit:
    print(exit.code, time.process_time(), *sorted({"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize("words, code, text", [(["--help"], 0, "--clip_range X"), (["--learning_rat", "1"], 2, "did you mean --learning_rate?")])
def test_help_and_typos_wait_for_no_heavy_import(words, code, text):
    """Under two seconds of a cold process."""
    command = [sys.executable, "-c", COLD, str(SCRIPTS / "train_flow_grpo.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    assert done.returncode == 0 and text in done.stdout + done.stderr, done.stderr
    status, seconds, *heavy = done.stdout.splitlines()[-1].split()
    assert (int(status), heavy) == (code, []) and float(seconds) < 2
