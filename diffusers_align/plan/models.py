"""Pipelines of fake weights, from the configs of their components: those of a folder, or those that the package ships for some models of the Hub."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ..training.run.model_loading import INDEX
from .fakes import FakeModels

CONFIGS = Path(__file__).parent / "configs"
_FILES = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")
_NO_SETTINGS = ("image_processor_type", "feature_extractor_type", "processor_class")
_TOKENIZER_CHARACTERS, _LONGEST = 4, 10**6


def shipped() -> list[str]:
    """The models of the Hub whose configs the package has."""
    return sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json"))


def configs_of(name: str, folder: Path | None = None) -> dict[str, Any]:
    """`model_index.json` of a pipeline, and the config of each component by its name.

    Args:
        folder: where the pipeline lies; its configs alone are read.

    Raises:
        ValueError: there is no folder, and the package has no configs of that model; or a component without a config.
    """
    if folder is None:
        path = CONFIGS / f"{name.replace('/', '--')}.json"
        if not path.is_file():
            raise ValueError(
                f"There are no configs of {name!r} in the package, and a plan downloads nothing. Name a folder with them: "
                f"`hf download {name} --include '*.json' --local-dir FOLDER` fetches no weights. Configs that are here: {', '.join(shipped())}."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    found: dict[str, Any] = {INDEX: index}
    for part in parts_of(index):
        files = [folder / part / file for file in _FILES if (folder / part / file).is_file()]
        if not files:
            raise ValueError(f"{folder / part} has none of {', '.join(_FILES)}, so nothing says how the pipeline's {part} is built: copy its config there.")
        found[part] = json.loads(files[0].read_text(encoding="utf-8"))
    return found


def parts_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of each component that a pipeline has, by its name."""
    return {name: tuple(value) for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1] is not None}


def build(models: FakeModels, configs: dict[str, Any], dtype: torch.dtype, folder: Path | None = None):
    """The pipeline, its models behind doors.

    Args:
        folder: of its tokenizers, where they are; others are stand-ins that cut texts into pieces of four characters.

    Raises:
        ValueError: a pipeline or a component that this installation has no class for.
    """
    index, components = configs[INDEX], {}
    for name, value in index.items():
        if isinstance(value, list):
            components[name] = None
    for name, (library, kind) in parts_of(index).items():
        components[name] = _component(models, name, _class(library, kind, name), configs[name], dtype, folder)
    cls = _class("diffusers", index["_class_name"], "pipeline")
    settings = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    pipeline = cls(**components, **settings)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            models.put_behind_doors(name, component)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _class(library: str, kind: str, name: str) -> type:
    try:
        module = importlib.import_module(library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}")
        return getattr(module, kind)
    except (ImportError, AttributeError) as error:
        versions = f"diffusers {diffusers.__version__} and transformers {transformers.__version__}"
        raise ValueError(f"The {name} is a {kind} of {library}, which {versions} do not have: a plan needs the class. Install versions that do.") from error


def _component(models: FakeModels, name: str, cls: type, config: dict[str, Any], dtype: torch.dtype, folder: Path | None) -> Any:
    if issubclass(cls, transformers.PreTrainedTokenizerBase) or name.startswith("tokenizer"):
        return _tokenizer(name, cls, config, folder)
    if not issubclass(cls, nn.Module):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(**{key: value for key, value in config.items() if key not in _NO_SETTINGS})
    with models.making():
        module = cls.from_config(config) if hasattr(cls, "load_config") else cls(cls.config_class(**config))
        return _in_precision(models.convertible(module.eval()), dtype)


def _in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained` loads it: some classes keep some weights in float32."""
    own = isinstance(module, diffusers.ModelMixin)
    single = [*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16 or own:
        single += getattr(module, "_keep_in_fp32_modules", None) or ()
    module.to(dtype)
    for name, part in module.named_modules() if dtype != torch.float32 else ():
        if set(single) & set(name.split(".")):
            part.to(torch.float32)
    return module


def _tokenizer(name: str, cls: type, config: dict[str, Any], folder: Path | None) -> Any:
    if folder is not None and any((folder / name).glob("*token*")):
        try:
            return cls.from_pretrained(folder / name)
        except Exception:  # of a folder that has the configs alone, each class fails in its own way
            pass
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<any>": 2}, unk_token="<any>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f".{{1,{_TOKENIZER_CHARACTERS}}}"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    length = min(int(config.get("model_max_length") or _LONGEST), _LONGEST)
    names = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<end>", "unk_token": "<any>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)
