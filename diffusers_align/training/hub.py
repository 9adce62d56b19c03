"""What a run leaves for others: the model card and, if asked, the upload."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import create_repo, upload_folder

from . import model_card

IGNORED = ["checkpoint-*", ".*", "logs/**"]


def write_model_card(
    run, results: dict[str, tuple[float, float]], pictures: list[str], note: str = "", judged_on: str = "held-out prompts", samples=()
) -> Path:
    """Write `README.md`, the card of a LoRA (`diffusers_align.training.model_card`).

    Args:
        results: (mean, s.e.) on what was judged, by name.
        note: on the training.
        samples: (prompt, image) of some for the Hub to show.
    """
    prompts, images = [prompt for prompt, _ in samples], [image for _, image in samples]
    widgets = model_card.write_widgets(run.output_dir, prompts, images)
    path = run.output_dir / "README.md"
    path.write_text(model_card.lora_card(run, results, pictures, note, judged_on, widgets), encoding="utf-8")
    return path


def create(run) -> None:
    """Make the repository, before training, so that a wrong token is found then; `--hub_model_id` becomes its full name."""
    run.args.hub_model_id = create_repo(run.args.hub_model_id or run.output_dir.name, exist_ok=True, token=run.args.hub_token).repo_id


def push(run) -> str:
    """Upload the output folder, without checkpoints, to the repository that `create` made; return its name."""
    repo = run.args.hub_model_id
    upload_folder(repo_id=repo, folder_path=run.output_dir, commit_message="End of training", ignore_patterns=IGNORED, token=run.args.hub_token)
    return repo
