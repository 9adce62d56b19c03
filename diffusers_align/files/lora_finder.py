"""Which files a LoRA is made of, to read it (`diffusers_align.lora` saves and loads): one for the first denoiser, one in a folder of its name for
each further one."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from ..checks.given_names import hub_reason, is_repository, nearest_path

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # diffusers' key for peft's configuration, as JSON


def find(name: str | Path, others: Iterable[str] = ()) -> Path:
    """The folder, or the `.safetensors` file, of a LoRA: a local one, or a repository of the Hub, which is downloaded.

    Args:
        others: files of the repository to bring along.

    Raises:
        FileNotFoundError: it is neither, or the folder holds no LoRA.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if not is_repository(str(name)):
            raise FileNotFoundError(f"No LoRA {str(name)!r}: there is no such folder or file.{nearest_path(path)}")
        try:
            path = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", *others], ignore_patterns=["checkpoint-*"]))
        except Exception as error:
            raise FileNotFoundError(f"No LoRA {str(name)!r}: there is no such folder or file, and from the Hub: {hub_reason(error)}.") from error
    first_file(path)
    return path


def first_file(path: str | Path) -> Path:
    """The first denoiser's file: `path` itself, or what lies in it as `pytorch_lora_weights.safetensors` or as the only `.safetensors`.

    Raises:
        FileNotFoundError: no such file, or a folder with none or with several under other names.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise FileNotFoundError(f"{path} is no .safetensors file; others may hold code, so they are not opened.")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"No LoRA {str(path)!r}: there is no such folder or file.{nearest_path(path)}")
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise FileNotFoundError(f"{path} holds several files ({', '.join(file.name for file in found)}) and no {WEIGHTS}: name one of them.")
    raise FileNotFoundError(f"No LoRA in {path}: it holds no {WEIGHTS}. Name the folder of a finished run or of a checkpoint, or the file itself.")


def files(path: str | Path, components: Iterable[str]) -> dict[str, Path]:
    """The file of each denoiser that has one, by component name: beside the first one's lie the folders of the others."""
    first, *others = components
    found = {first: first_file(path)}
    for name in others:
        for candidate in (found[first].parent / name / found[first].name, found[first].parent / name / WEIGHTS):
            if candidate.is_file():
                found[name] = candidate
                break
    return found


def digest(path: str | Path) -> str:
    """SHA-256 of a LoRA's files, further denoisers' included."""
    first = first_file(path)
    others = sorted(file for file in first.parent.glob(f"*/{first.name}") if file.parent.name.startswith(("unet", "transformer")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in (first, *others))).hexdigest()


def metadata(file: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def configuration(file: Path) -> dict:
    """peft's configuration of a LoRA that was saved with one, without the component's name before each field; {} if there is none."""
    fields = json.loads(metadata(file).get(METADATA, "{}"))
    prefixes = {key.split(".", 1)[0] for key in fields if "." in key}
    denoiser = next((prefix for prefix in sorted(prefixes) if prefix.startswith(("unet", "transformer"))), None)
    return {key.removeprefix(f"{denoiser}."): value for key, value in fields.items() if denoiser is None or key.startswith(f"{denoiser}.")}


def scales(file: Path, weights: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, float]:
    """By which number stock diffusers multiplies each layer's product when it loads the file: what is saved with it says so, or the tensors named alpha, or
    it is 1.

    Args:
        weights: the file's tensors, in peft's keys.
        alphas: that it states among them, by layer with `.alpha`.
    """
    config = configuration(file)
    ranks = {key.rsplit(".lora_A", 1)[0]: value.shape[0] for key, value in weights.items() if ".lora_A" in key}
    patterns = config.get("alpha_pattern") or {}
    common = config.get("lora_alpha") or (Counter(alphas.values()).most_common(1)[0][0] if alphas else None)

    def alpha(layer: str) -> float | None:
        own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        return next(own, alphas.get(f"{layer}.alpha", common))

    power = 0.5 if config.get("use_rslora") else 1
    return {layer: 1.0 if alpha(layer) is None else alpha(layer) / rank**power for layer, rank in ranks.items()}
