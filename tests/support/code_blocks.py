"""Reads the code blocks of Markdown files, and runs or checks each by its language; docs/keeping_the_docs.md says how a page declares what."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

import diffusers_align.__main__ as command_line
from diffusers_align.training.flags.options import Arguments, options_of

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "pipelines", "schedulers", "benchmarks", "training_scripts", "diffusers_align", "tests")
FREE = {"text", "console", "mermaid", "math", "bibtex"}
# What a recipe of a few lines leaves to the rest of the recipe.
REQUIRED = {"pretrained_model_name_or_path": "mini-sd3", "prompts": "mini_train", "reward": "scene_score", "output_dir": "out", "dataset_name": "pairs"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page, line: where its first line of code is, from 1 on.
        replacements: (old, new) pairs of its `run` comment.
        setup: Python that runs before it.
        reason: why it is not run; None if it is.
    """

    page: Path
    line: int
    language: str
    text: str
    replacements: tuple[tuple[str, str], ...] = ()
    setup: str = ""
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} ({self.language})"

    @property
    def code(self) -> str:
        """The text, with what its comment replaces."""
        text = self.text
        for old, new in self.replacements:
            text = replaced(text, old, new, self.language)
        return text


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    return sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order, with the comments that stand right before each."""
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    found, comments, i = [], [], 0
    while i < len(lines):
        fence = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines) + 1) if j == len(lines) or re.match(rf"\s*{fence[1]}\s*$", lines[j]))
            indent = len(lines[i]) - len(lines[i].lstrip())
            code = "\n".join(line[indent:] for line in lines[i + 1 : end]) + "\n"
            found.append(Block(page, i + 2, fence[2], code, **told(comments)))
            i, comments = end + 1, []
        elif lines[i].strip().startswith("<!--"):
            end = next(j for j in range(i, len(lines)) if "-->" in lines[j])
            comments.append("\n".join(lines[i : end + 1]).strip().removeprefix("<!--").removesuffix("-->").strip())
            i = end + 1
        else:
            i, comments = i + 1, []
    return found


def told(comments: list[str]) -> dict:
    """What the comments before a block say of it."""
    said: dict = {}
    for comment in comments:
        kind, _, rest = comment.partition(":")
        if kind == "run":
            pairs = [word.partition("=") for word in shlex.split(rest)]
            assert pairs and all(old and equals for old, equals, _ in pairs), f"<!-- run: ... --> holds OLD=NEW, got {rest!r}"
            said["replacements"] = tuple((old, new) for old, _, new in pairs)
        elif kind == "not run":
            assert rest.strip(), "<!-- not run: ... --> says why"
            said["reason"] = " ".join(rest.split())
        elif kind == "setup":
            said["setup"] = textwrap.dedent(rest).strip()
    return said


def replaced(text: str, old: str, new: str, language: str) -> str:
    """`old` gets the value `new` where it is a name that the block gives one; elsewhere `new` stands in its place."""
    value = r"""(?:"[^"\n]*"|'[^'\n]*'|[^\s,)]+)"""
    forms = {"python": rf"(?<=\b{re.escape(old)}=){value}", "bash": rf"(?<=--{re.escape(old)} ){value}", "yaml": rf"(?m)(?<=^{re.escape(old)}: ).*$"}
    if re.fullmatch(r"\w+", old) and language in forms and re.search(forms[language], text):
        return re.sub(forms[language], lambda match: new, text)
    assert old in text, f"the comment replaces {old!r}, which is not in the block"
    return text.replace(old, new)


def run(block: Block, names: dict, folder: Path) -> None:
    """Run or check a block in `folder`, its working directory; `names` are the page's."""
    assert block.language in {*RUNNERS, *FREE}, f"no way to check {block.language or 'a fence without a language'}: one of {sorted({*RUNNERS, *FREE})}"
    if block.language in FREE or block.reason is not None:
        return
    execute(block.setup, names, f"{block.page}, setup", block.line)
    RUNNERS[block.language](block, names, folder)


def execute(code: str, names: dict, file: str, line: int) -> None:
    exec(compile("\n" * (line - 1) + code, file, "exec"), names)


def run_python(block: Block, names: dict, folder: Path) -> None:
    if name := re.match(r"# (\w+\.py)\b", block.code):
        (folder / name[1]).write_text(block.code, encoding="utf-8")
    execute(block.code, names, str(block.page), block.line)


def read_json(block: Block, names: dict, folder: Path) -> None:
    try:
        json.loads(block.code)
    except json.JSONDecodeError:
        for line in block.code.splitlines():
            json.loads(line)


def read_yaml(block: Block, names: dict, folder: Path) -> None:
    """A recipe that some script takes, or a configuration of accelerate."""
    name = re.match(r"# (\S+\.ya?ml)\b", block.code)
    file = folder / (name[1] if name else "recipe.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.code, encoding="utf-8")
    keys = yaml.safe_load(block.code)
    if "compute_environment" in keys:
        load_config_from_file(str(file))
        return
    refusals = {}
    for script in sorted((ROOT / "training_scripts").glob("*.py")):
        module = loaded(script)
        options = options_of(next(value for value in vars(module).values() if is_flags_of(value, module)))
        missing = [word for name, option in options.items() if option.is_required and name not in keys for word in (f"--{name}", REQUIRED.get(name, "x"))]
        try:
            quietly(module.parse_args, ["--config", str(file), *missing])
            return
        except AssertionError as refusal:
            refusals[script.stem] = str(refusal)
    raise AssertionError("no script takes this recipe:\n" + "\n".join(f"{name}: {why}" for name, why in refusals.items()))


def is_flags_of(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, Arguments) and value.__module__ == module.__name__


def read_bash(block: Block, names: dict, folder: Path) -> None:
    """Every command of a block, with the variables that it sets."""
    variables: dict[str, str] = {}
    for line in block.code.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), line)
        line = re.sub(r"\$\(diffusers-align path (\w+)\)", lambda match: printed(command_line.main, ["path", match[1]]), line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, command = True, []
        for word in [*lexer, ";"]:
            if not set(word) <= set("&|;"):
                command.append(word)
                continue
            while command and (assigned := re.fullmatch(r"(\w+)=(.*)", command[0], re.DOTALL)):
                variables[assigned[1]] = assigned[2]
                command = command[1:]
            if command:
                read_command(command)
            command = []


def read_command(command: list[str]) -> None:
    name, *words = command
    name = Path(name).name
    assert name in COMMANDS, f"no way to check the command {name!r}: one of {sorted(COMMANDS)}"
    COMMANDS[name](words)


def read_accelerate(words: list[str]) -> None:
    if words == ["config"]:
        return
    assert words[:1] == ["launch"], f"accelerate {words[0]}?"
    launch = quietly(launch_command_parser().parse_args, words[1:])
    read_script(launch.training_script, launch.training_script_args)


def read_python(words: list[str]) -> None:
    if words[0] != "-m":
        read_script(words[0], words[1:])
    elif words[1].startswith(("diffusers_align.", "benchmarks.")):
        package = importlib.util.find_spec(words[1])
        assert package, f"no module {words[1]}"
        by_main(importlib.import_module(f"{words[1]}.__main__" if package.submodule_search_locations else words[1]), words[2:])
    else:
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"


def read_script(script: str, words: list[str]) -> None:
    """A script's flags, by its own parser."""
    path = Path(script) if Path(script).is_file() else ROOT / script
    assert path.is_file(), f"no script {script}"
    module = loaded(path)
    if hasattr(module, "parse_args"):
        quietly(module.parse_args, words)
    else:
        by_main(module, words)


def by_main(module: ModuleType, words: list[str]) -> None:
    """The flags of a program whose parser is in `main`: it is stopped as soon as they are read."""

    class Read(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Read

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.object(sys, "argv", [str(module.__file__), *words]):
        with contextlib.suppress(Read):
            quietly(module.main)
            raise AssertionError(f"{module.__name__}.main has read no flags")


def read_pip(words: list[str]) -> None:
    assert words[0] == "install", f"pip {words[0]}?"
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    for word in words[1:]:
        if not word.startswith("-"):
            asked = Requirement(re.sub(r"^\.", "diffusers-align", word))
            assert asked.name != "diffusers-align" or asked.extras <= extras, f"no extra {asked.extras - extras}"


def read_diffusers_align(words: list[str]) -> None:
    """What it prints is looked at; of a plan, which takes minutes for a real model, the flags alone."""
    with mock.patch("diffusers_align.plan.command.fitted", lambda *args: None), mock.patch("diffusers_align.plan.report.report", lambda plan: "a plan"):
        printed(command_line.main, words)


def read_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        if variable := re.match(r"(\w+)=", word):
            assert re.search(rf"^{variable[1]} \?=", makefile, re.MULTILINE), f"no variable {variable[1]}"
        else:
            assert re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), f"no target {word}"


def read_tool(name: str) -> Callable[[list[str]], None]:
    """A command whose words are not ours to check: that it is there is."""

    def check(words: list[str]) -> None:
        assert importlib.util.find_spec(name), f"{name} is not installed"

    return check


def loaded(path: Path) -> ModuleType:
    """A script as a module; read once."""
    name = f"script_of_docs_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
                spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def quietly(call: Callable, *args):
    """What a call returns; its refusal (argparse's exit) as an AssertionError with the message."""
    with contextlib.redirect_stderr(errors := _Text()), contextlib.redirect_stdout(_Text()):
        try:
            return call(*args)
        except SystemExit as end:
            if end.code not in (0, None):
                raise AssertionError(errors.getvalue().strip().rpartition("error: ")[2] or str(end.code)) from None


def printed(call: Callable, *args) -> str:
    with contextlib.redirect_stdout(out := _Text()):
        call(*args)
    return out.getvalue().strip()


class _Text:
    """A stream that keeps what is written."""

    def __init__(self):
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def getvalue(self) -> str:
        return "".join(self.parts)


RUNNERS = {"python": run_python, "bash": read_bash, "yaml": read_yaml, "json": read_json}
COMMANDS = {
    "accelerate": read_accelerate,
    "python": read_python,
    "pip": read_pip,
    "make": read_make,
    "diffusers-align": read_diffusers_align,
    "ruff": read_tool("ruff"),
}
