"""What a run leaves for others: the model card and, if asked, the upload."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .. import __version__, embedded
from . import resuming

IGNORED = ["checkpoint-*", ".*", "logs/**"]


def write_model_card(run, results: dict[str, tuple[float, float]], pictures: list[str], note: str = "", judged_on: str = "held-out prompts") -> Path:
    """Write `README.md`: how to load the LoRA, results as (mean, s.e.) on what was judged, pictures, a note on the training, the command and the
    configuration."""
    args, name = run.args, run.args.pretrained_model_name_or_path
    base = f'embedded.path("{name}")' if name in embedded.NAMES else f'"{name}"'
    imports = "from diffusers import DiffusionPipeline" + ("\n\nfrom diffusers_align import embedded" if name in embedded.NAMES else "")
    front = {
        "library_name": "diffusers", "license": "other", "tags": ["diffusers", "lora", "diffusers-align", run.algorithm.lower(), "template:sd-lora"],
        **({} if name in embedded.NAMES or Path(name).exists() else {"base_model": name}),
    }  # fmt: skip
    config = {key: value for key, value in sorted(vars(args).items()) if key not in ("hub_token", "config", "trackers", "command") and value is not None}
    rows = "\n".join(f"| {key} | {mean:.4f} ± {error:.4f} |" for key, (mean, error) in results.items())
    caption = f"Results on {judged_on} at equal seeds (mean ± standard error, {args.num_eval_samples} images):"
    table = f"{caption}\n\n| | |\n|---|---|\n{rows}\n\n" if results else ""
    story = f"{note}\n\n" if note else ""
    shown = "\n\n".join(f"![{Path(p).stem.replace('_', ' ')}]({p})" for p in pictures)
    repo = args.hub_model_id or run.output_dir.name
    aim = f"the preferences of `{args.dataset_name}`" if getattr(args, "dataset_name", None) else f"the reward `{args.reward}`"
    card = f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {repo}

A LoRA that aligns `{name}` with {aim}, trained by {run.algorithm} with diffusers-align {__version__}.

```python
{imports}

pipe = DiffusionPipeline.from_pretrained({base})
pipe.load_lora_weights("{repo}", weight_name="pytorch_lora_weights.safetensors")
```

{table}{shown}

## Training

{story}```bash
{resuming.commands(run)}
```

```yaml
{yaml.safe_dump(config, sort_keys=False).strip()}
```
"""
    path = run.output_dir / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def create(run) -> str:
    """Make the repository, before anything is loaded, so that a wrong name or token is found then; return its full name.

    Raises:
        ValueError: the Hub allows no such name.
        OSError: it cannot be reached, or refuses.
    """
    wanted = run.args.hub_model_id or run.output_dir.resolve().name
    origin = "--hub_model_id" if run.args.hub_model_id else "the output folder's name, for want of --hub_model_id,"
    try:
        validate_repo_id(wanted)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub: {origin} {wanted!r} is no name of a repository: {error}") from error
    try:
        return create_repo(wanted, exist_ok=True, token=run.args.hub_token).repo_id
    except Exception as error:  # of whichever HTTP library, and of the Hub
        raise OSError(
            f"--push_to_hub: the repository {wanted!r} could not be made: {_first_line(error)}. Look at the network, at the login (`hf auth whoami`) and at "
            "--hub_model_id, or leave out --push_to_hub and upload the folder after training."
        ) from error


def push(run) -> str:
    """Upload the output folder, without checkpoints, to the repository that `create` made; return its name.

    Raises:
        OSError: it failed; the message says what is on disk and how to upload it.
    """
    repo, run.doing = run.args.hub_model_id, "while the results, which are complete on disk, were uploaded"
    try:
        upload_folder(repo_id=repo, folder_path=run.output_dir, commit_message="End of training", ignore_patterns=IGNORED, token=run.args.hub_token)
    except Exception as error:
        command = shlex.join(["hf", "upload", repo, str(run.output_dir), ".", *(word for pattern in IGNORED for word in ("--exclude", pattern))])
        raise OSError(f"The upload to {repo} failed: {_first_line(error)}. Everything is in {run.output_dir}; to upload it: {command}") from error
    return repo


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
