"""Model cards: front matter that the Hub understands, lines that load what was trained, and nothing of the machine that trained it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from diffusers import ModularPipeline

from ... import __version__, embedded, lora
from ...checks.given_names import is_repository
from ...data.inputs import parse_input_columns
from ...driving.calls import calls_of
from ...files.paths import folder as shipped
from ..checkpoints import allowed_changes
from .comparison import as_text
from .pictures import film_strip, to_pil
from .sounds import write_wav

HIDDEN = ("hub_token", "config", "trackers", "command")
NUM_WIDGETS = 4
_LICENSE = "of-the-base-model"


def public(value: Any) -> Any:
    """A flag's value as it may be published: of absolute paths the last part, of URLs neither user, password nor query."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    value = re.sub(r"\bfile://(?=/)", "", value)
    value = re.sub(r"(\w+://)[^/@\s]*@", r"\1", value)
    value = re.sub(r"(\w+://[^\s?#]*)[?#][^\s*+]*", r"\1", value)
    if re.match(r"(/|~|[A-Za-z]:\\)", value) and not re.search(r"[:*+,{]", value[2:]):  # one path, whatever blanks it has
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    value = re.sub(r"^~?/(?:[^*+,:'\"/]+/)*(?=[^\s/])", "", value)  # with blanks: the value begins with a path
    return re.sub(r"(?<![\w.:/~-])~?/(?:[^\s*+,:'\"/]+/)*(?=[^\s/])", "", value)


def public_command(command: str) -> str:
    """Command lines, one per line, that can be pasted elsewhere: a script of an installed package is found by `diffusers-align path`."""
    lines = []
    for line in command.splitlines():
        words = []
        if not line or line.startswith("#"):
            lines.append(line)
            continue
        for word in shlex.split(line):
            flag, separator, value = word.partition("=") if word.startswith("--") else ("", "", word)
            path = Path(value)
            if path.suffix == ".py" and path.is_absolute() and path.parent == shipped("training_scripts"):
                bundled = "shipped" in path.parts
                words.append(f"$(diffusers-align path {path.stem})" if bundled else f"training_scripts/{path.name}")
            else:
                words.append(shlex.quote(f"{flag}{separator}{public(value)}"))
        lines.append(" ".join(words))
    return "\n".join(lines)


def public_configuration(args) -> str:
    """The flags' values, as YAML."""
    values = args.model_dump() if hasattr(args, "model_dump") else vars(args)
    config = {key: public(value) for key, value in sorted(values.items()) if key not in HIDDEN and value is not None}
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip()


def front_matter(base: str | None, tags: list[str], pipeline_tag: str, widgets: list[dict] | None = None, data: str | None = None) -> str:
    """What stands between the lines of dashes.

    Args:
        base: the model that was trained, as the flags name it.
        data: the data set, as the flags name it.
    """
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": pipeline_tag, "license": "other"}
    if base in embedded.NAMES:
        fields["license"] = "apache-2.0"
    else:
        fields["license_name"] = _LICENSE
    if base and base not in embedded.NAMES and is_repository(base) and not Path(base).exists():
        fields |= {"license_link": f"https://huggingface.co/{base}", "base_model": base}
    if data and is_repository(data) and not Path(data).exists():
        fields["datasets"] = [data]
    fields["tags"] = ["diffusers", "diffusers-align", *tags]
    if widgets:
        fields["widget"] = widgets
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()}\n---"


def pipeline_tag(pipeline, given: Iterable[str] = (), sound: bool = False) -> str:
    """The Hub's name for what a pipeline does, by the arguments of its call; `given` are those that a call has beside its prompt, and `sound` whether
    it was heard to make sound."""
    parameters = calls_of(pipeline).of_a_call({"prompt": "", **dict.fromkeys(given, "")})
    source = "image" if "image" in parameters else "text"
    if sound or "audio_length_in_s" in parameters or "audio_end_in_s" in parameters:
        return "text-to-audio"
    return f"{source}-to-{'video' if 'num_frames' in parameters else 'image'}"


def write_widgets(output_dir: Path, prompts: list[str], images: list, sampling_rate: int | None = None) -> list[dict]:
    """Some samples as files of their own, with their prompts: what the Hub shows or plays beside a LoRA. Of a video, a film strip."""
    found = []
    for number, (prompt, image) in enumerate(zip(prompts, images[:NUM_WIDGETS]), 1):
        (output_dir / "widget").mkdir(exist_ok=True)
        file = output_dir / "widget" / f"{number}.{'wav' if image.ndim == 2 else 'png'}"
        if image.ndim == 2:
            write_wav(file, image, sampling_rate)
        else:
            to_pil(film_strip(image) if image.ndim == 4 else image).save(file)
        found.append({"text": prompt or "-", "output": {"url": f"widget/{file.name}"}})
    return found


def published_as(run) -> str:
    """What lines that load it call the output folder: the repository that it is pushed to, or the folder."""
    args = run.args
    return args.hub_model_id if args.push_to_hub and args.hub_model_id else public(str(args.output_dir))


def page(run, front: str, title: str, text: str, code: str, caption: str, results: dict[str, str], pictures: list[str], note: str = "") -> str:
    """A card: what it is and the lines that load it, results in words with a caption (none: no table), pictures of the output folder, a note
    on the training, the command and the configuration."""
    rows = "\n".join(f"| {as_text(public(name))} | {value} |" for name, value in results.items())
    table = f"{caption}\n\n| | |\n|---|---|\n{rows}\n\n" if results else ""
    note = " ".join(filter(None, (run.health.for_card(), note)))
    shown = "\n\n".join(f"![{Path(p).stem.replace('_', ' ')}]({p})" for p in pictures)
    return f"""{front}

# {title}

{text}

```python
{code}
```

{table}{shown}

## Training

{f"{note}{chr(10) * 2}" if note else ""}```bash
{public_command(allowed_changes.commands(run))}
```

```yaml
{public_configuration(run.args)}
```
"""


def lora_card(run, results: dict[str, str], pictures: list[str], note: str, judged_on: str, widgets: list[dict], sound: bool = False) -> str:
    """The card of a LoRA: see `page`."""
    args, policy, given = run.args, run.policy, run.args.pretrained_model_name_or_path
    pushed, where, data = bool(args.push_to_hub), published_as(run), getattr(args, "dataset_name", None)
    input_names = parse_input_columns(args.input_columns) if getattr(args, "input_columns", None) else ()
    tags = ["lora", "template:sd-lora", re.sub(r"[^a-z0-9]+", "-", run.algorithm.lower()).strip("-")]
    front = front_matter(given, tags, pipeline_tag(policy.pipeline, input_names, sound), widgets, data)
    stored = getattr(args, "trajectories", None)
    source = f"the preferences of `{public(data)}`" if data else f"the rewards of the trajectories in `{public(stored)}`" if stored else None
    aim = source or f"the reward `{public(args.reward)}`"
    text = f"A LoRA that aligns `{public(given)}` with {aim}, trained by {run.algorithm} with diffusers-align {__version__}."
    measured = f"; the reward, which only measures, is `{public(args.reward)}`" if source and args.reward else ""
    caption = f"Results on {judged_on} at equal seeds (mean ± standard error, {args.num_eval_samples} {'sounds' if sound else 'images'}{measured}):"
    title = where if pushed else run.output_dir.resolve().name  # "." has none
    return page(run, front, title, text, loading_lines(policy, args, where), caption, results, pictures, note)


def loading_lines(policy, args, where: str) -> str:
    """Python that makes the aligned pipeline, of the files that were trained on: stock diffusers where it has a loader, one line per denoiser."""
    given, pushed = args.pretrained_model_name_or_path, bool(args.push_to_hub)
    lines, (cls, method, *then) = lora.stock_lines(policy.pipeline, policy.denoisers, where, pushed), _loader(policy.pipeline, args)
    imports = [f"from diffusers import {cls}"]
    if given in embedded.NAMES:
        imports = [*imports, "", "from diffusers_align import embedded"]
    if any(line.startswith("diffusers_align.") for line in lines):
        imports = ["import diffusers_align", *imports]
    base = f'embedded.path("{given}")' if given in embedded.NAMES else f'"{public(given)}"'
    remark = [] if pushed else ["# The folder of this file"]
    return "\n".join([*imports, "", f"pipe = {cls}.{method.format(base)}", *then, *remark, *lines])


def _loader(pipeline, args) -> tuple[str, ...]:
    """The class and its method, with a place for the model, that load what the flags name, and lines that follow."""
    words = {name: f', {name}="{public(value)}"' for name in ("revision", "variant") if (value := getattr(args, name, None))}
    revision, variant = words.get("revision", ""), words.get("variant", "")
    if isinstance(pipeline, ModularPipeline):
        return "ModularPipeline", f"from_pretrained({{}}{revision})", f"pipe.load_components({variant.removeprefix(', ')})"
    if args.pretrained_model_name_or_path.endswith(".safetensors"):
        config = getattr(args, "single_file_config", None)
        return type(pipeline).__name__, "from_single_file({}" + (f', config="{public(config)}")' if config else ")")
    return "DiffusionPipeline", f"from_pretrained({{}}{revision}{variant})"
