"""What a run leaves for others: the model card and, if asked, the upload."""

from __future__ import annotations

import shlex
from glob import escape
from pathlib import Path

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import HFValidationError, validate_repo_id

from . import model_card

IGNORED = ["checkpoint-*", ".*", "logs/**"]


def write_model_card(
    run, results: dict[str, str], pictures: list[str], note: str = "", judged_on: str = "held-out prompts", samples=(), sampling_rate=None
) -> Path:
    """Write `README.md`, the card of a LoRA (`diffusers_align.training.report.model_card`).

    Args:
        results: on what was judged, in words, by name.
        note: on the training.
        samples: (prompt, image) of some for the Hub to show or to play.
        sampling_rate: of the samples' sound, if they have any.
    """
    prompts, images = [prompt for prompt, _ in samples], [image for _, image in samples]
    widgets, sound = model_card.write_widgets(run.output_dir, prompts, images, sampling_rate), any(image.ndim == 2 for image in images)
    if sampling_rate is not None:
        heard = f"{'The pictures are spectrograms. ' if sound else ''}The sounds, before and after, are WAV files in `sounds/`."
        note = f"{heard} {note}".strip()
    path = run.output_dir / "README.md"
    path.write_text(model_card.lora_card(run, results, pictures, note, judged_on, widgets, sound), encoding="utf-8")
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


def ignored(folder: Path) -> list[str]:
    """What of a run's folder stays here, as patterns: checkpoints, logs, what is hidden, and other runs that lie below it."""
    return [*IGNORED, *(f"{escape(path.parent.name)}/**" for path in sorted(folder.glob("*/metrics.jsonl")))]


def push(run) -> str:
    """Upload the output folder, without what is `ignored`, to the repository that `create` made; return its name.

    Raises:
        OSError: it failed; the message says what is on disk and how to upload it.
    """
    repo, patterns, run.doing = run.args.hub_model_id, ignored(run.output_dir), "while the results, which are complete on disk, were uploaded"
    try:
        upload_folder(repo_id=repo, folder_path=run.output_dir, commit_message="End of training", ignore_patterns=patterns, token=run.args.hub_token)
    except Exception as error:
        command = shlex.join(["hf", "upload", repo, str(run.output_dir), ".", *(word for pattern in patterns for word in ("--exclude", pattern))])
        raise OSError(f"The upload to {repo} failed: {_first_line(error)}. Everything is in {run.output_dir}; to upload it: {command}") from error
    return repo


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
