"""Names with an underscore: which of them a module reads of objects that are not its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Private names of other libraries that we read, by what they are; docs/patches.md says where, and what breaks it.
UPSTREAM = {
    "_modules": "torch: the parts of a module",
    "_parameters": "torch: the weights of a module itself",
    "_buffers": "torch: the buffers of a module itself",
    "_forward_hooks": "torch: hooks of a module",
    "_forward_pre_hooks": "torch: hooks of a module",
    "_orig_mod": "torch: what torch.compile wraps",
    "_fsdp_wrapped_module": "torch: what FSDP wraps",
    "_checkpoint_wrapped_module": "torch: what activation checkpointing wraps",
    "_pytree": "torch: nested lists, dicts and tensors",
    "_version": "torch: how often a tensor was written to",
    "_is_view": "torch: whether a tensor is a view",
    "_apply": "torch: what `to` does to each weight of a module",
    "_foreach_lerp_": "torch: a moving average of many tensors in one call",
    "_step_count": "torch: position of a learning-rate schedule",
    "_last_lr": "torch: position of a learning-rate schedule",
    "_hf_hook": "accelerate: offloading of a module",
    "_diffusers_hook": "diffusers: hooks of a module",
    "_get_compatibles": "diffusers: the schedulers whose configs a scheduler takes",
    "_use_default_values": "diffusers: the entries of a config that nobody gave",
    "_is_stateful": "diffusers: whether a hook remembers earlier calls",
    "_attention_backend": "diffusers: the kernels of an attention processor",
    "_cache_config": "diffusers: the cache of a denoiser",
    "_progress_bar_config": "diffusers: of a pipeline",
    "_execution_device": "diffusers: of a pipeline",
    "_blocks": "diffusers: of a modular pipeline",
    "_identifier_key": "diffusers: which prediction a guider's batch is of",
    "_encode_prompt": "diffusers: the name that some pipelines have for encode_prompt",
    "_get_signature_keys": "diffusers: what a pipeline is made of",
    "_optional_components": "diffusers: what a pipeline is made of",
    "_internal_dict": "diffusers: the config of a scheduler",
    "_step_index": "diffusers: position of a scheduler",
    "_init_step_index": "diffusers: position of a scheduler",
    "_threshold_sample": "diffusers: how a scheduler clips clean samples",
    "_scale_factors": "diffusers: whether a scheduler's states grow",
    "_upscale_mode": "diffusers: how a scheduler's states grow",
    "_alpha_cumprod": "diffusers: the table of a scheduler with continuous time",
    "_supports_gradient_checkpointing": "diffusers: of a model",
    "_lora_loadable_modules": "diffusers: which models a pipeline's LoRA loader reaches",
    "_maybe_expand_t2v_lora_for_i2v": "diffusers: a step of a pipeline's LoRA loader",
    "_hf_peft_config_loaded": "diffusers: whether a model has adapters",
    "_disable_adapters": "peft: whether a layer's adapters are off",
    "_active_adapter": "peft: which of a layer's adapters are on",
    "_keep_in_fp32_modules": "diffusers, transformers: parts that are loaded in float32",
    "_keep_in_fp32_modules_strict": "transformers: parts that are loaded in float32",
    "_lora_layers": "diffusers: end of the names of arguments",
    "_lora_adapter_metadata": "diffusers: end of the names of arguments",
}
# Names with an underscore that are documented, or no names of attributes.
PUBLIC = {"_class_name", "_exit", "_getframe", "_uid", "_se", "_prompt", "_seed"}


def defined_in(tree: ast.AST) -> set[str]:
    """Names of functions, classes, fields and attributes of `self` that a module defines."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__dict__.update"):
            names |= {keyword.arg for keyword in node.keywords}
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names_read(tree: ast.AST, everywhere: set[str]) -> set[str]:
    """Private names that a module reads and does not define: of other objects, by attribute, by string, or by import."""
    here, found = defined_in(tree), set()
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list) and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr not in (here | everywhere if is_self(node.value) else here):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings and node.value not in here:
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return {name for name in found if PRIVATE.fullmatch(name)}


CODE = [*sorted((ROOT / "diffusers_align").rglob("*.py")), *sorted((ROOT / "training_scripts").glob("*.py"))]
# What `self` may have: defined by any of our classes, since parents lie in other modules.
EVERYWHERE = {name for path in CODE for name in defined_in(ast.parse(path.read_text()))}
