"""What we change of other libraries, or read of their insides: each is on one page, and still what upstream has.

A failure here after an upgrade says which row of docs/patches.md to look at.
"""

import ast
import builtins
import copy
import inspect
import re
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import HookRegistry
from peft import LoraConfig, inject_adapter_in_model
from private_names import CODE, ROOT, UPSTREAM
from torch import nn

from diffusers_align.driving.blocks import leaves
from diffusers_align.driving.calls import calls_of
from diffusers_align.driving.replacements import InPlace, held, reads_global, replaced, with_globals
from diffusers_align.driving.scheduler_hook import _asks_first
from diffusers_align.pipelines.base import WrappedPipeline

PACKAGE, PAGE = ROOT / "diffusers_align", ROOT / "docs" / "patches.md"
PIPELINES = [
    getattr(diffusers, f"{name}Pipeline")
    for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "PixArtSigma", "Sana", "Lumina2", "QwenImage", "ZImage", "Wan", "LTX")
]
SCHEDULERS = [
    getattr(diffusers, f"{name}Scheduler")
    for name in ("DDIM", "DDPM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep", "FlowMatchEulerDiscrete")
]


def holds(fact: bool, row: str, changed: str) -> None:
    """Fail in words a test of what a row of the page stands on."""
    if not fact:
        versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}, accelerate {accelerate.__version__}"
        pytest.fail(f"{changed}\nSee docs/patches.md, {row!r}: it says what of ours stands on it, and where. ({versions})", pytrace=False)


def call_of(pipeline: type):
    return inspect.unwrap(pipeline.__call__)


# the page


def rows() -> list[list[str]]:
    """The cells of the page's tables, without their heads."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [cells for line in lines if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] not in ("What", "Name") and set(cells[0]) != {"-"}]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def patches(path: Path) -> set[tuple[str, str]]:
    """(top-level definition, what) of each change of another's object or of the process in a module."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for top in tree.body:
        place = getattr(top, "name", "module")
        for node in ast.walk(top):
            found |= {(place, what) for what in of_node(node) if what}
    return found


STATE = re.compile(r"\b(__dict__|_modules|environ|environment)$|^vars\((?!self\b)|^sys\.(meta_path|path|modules)$")
MUTATORS = {"update", "pop", "setdefault", "clear", "insert", "append", "remove"}
PROCESS = re.compile(r"signal\.signal|atexit\.register|torch\.set_(?!grad_enabled|rng)\w+|torch\.use_deterministic_algorithms|warnings\.(simple)?filter\w*")


def of_node(node: ast.AST) -> list[str]:
    """The patches that a node makes."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in ("replaced", "held") and len(node.args) == 3:
            return [node.args[1].value if isinstance(node.args[1], ast.Constant) else name]
        if name in ("InPlace", "with_globals") or PROCESS.fullmatch(name):
            return [name]
        if name in ("setattr", "delattr") and ast.unparse(node.args[0]) not in ("self", "args"):
            return [name]
        base, _, method = name.rpartition(".")
        return [shared(base)] if method in MUTATORS else []
    if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        if isinstance(node, ast.Subscript):
            return [shared(ast.unparse(node.value))]
        whole = ast.unparse(node)
        return (
            [whole]
            if whole.startswith("torch.backends.")
            else [node.attr]
            if node.attr in ("__class__", "forward", "exec_module") and not whole.startswith("self.")
            else []
        )
    return []


def shared(target: str) -> str:
    """What a change of `target` is a change of; "" for our own."""
    return (found.group() if not target.startswith("self.") and (found := STATE.search(target)) else "").removesuffix("(")


# But for the module of the tools.
CHANGED = [path for path in CODE if path.stem != "replacements"]
PATCHES = sorted((path.relative_to(ROOT).as_posix().removeprefix("diffusers_align/"), *patch) for path in CHANGED for patch in patches(path))


def test_patches_are_found():
    found = {(path, place) for path, place, _ in PATCHES}
    assert {
        ("driving/denoiser_gates.py", "gated"),
        ("driving/scheduler_hook.py", "_hooked"),
        ("training/run/costs.py", "Meter"),
        ("__init__.py", "module"),
    } <= found
    source = "m.forward = self.forward = 1\ns.__class__ = int\nvars(m).update(a=1)\nm.__dict__['x'] = self.__dict__['y'] = 2\nsys.path.append('')"
    assert sorted(what for node in ast.walk(ast.parse(source)) for what in of_node(node) if what) == ["__class__", "__dict__", "forward", "sys.path", "vars"]


@pytest.mark.parametrize("path, place, what", PATCHES)
def test_the_page_lists_every_patch(path, place, what):
    where = [cells for cells in rows() if {path, place} <= set(quoted(cells[1]))]
    assert where, f"{path}: {place} changes {what}, which is another's. Give it a row in docs/patches.md: what, where, why, what breaks it, the test."


@pytest.mark.parametrize("cells", rows(), ids=lambda cells: cells[0].replace("`", "")[:40])
def test_what_the_page_lists_is_there(cells):
    assert len(cells) in (3, 5) and all(cells)
    files = [word for word in quoted(cells[1]) if word.endswith(".py")]
    sources = [next(root / file for root in (PACKAGE, ROOT) if (root / file).is_file()).read_text(encoding="utf-8") for file in files]
    assert sources
    for word in quoted(cells[1]):
        assert word.endswith(".py") or word == "module" or any(re.search(rf"^(def|class) {word}\b", source, re.M) for source in sources), word
    for test in quoted(cells[4]) if len(cells) == 5 else ():
        tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
        assert f"def {test}(" in tests, test


@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_the_page_lists_every_private_name_that_is_read(name):
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8"), "say in docs/patches.md what it is read for, and what breaks it"


# our own tools


def test_a_method_is_replaced_on_one_object_alone_and_copies_have_the_original():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = first(x)
    with replaced(first, "forward", lambda forward, x: forward(x) + 1):
        assert torch.equal(first(x), expected + 1) and isinstance(first.forward, InPlace)
        assert inspect.signature(first.forward) == inspect.signature(second.forward)
        assert torch.equal(copy.deepcopy(first)(x), expected)
        with replaced(first, "forward", lambda forward, x: 2 * forward(x)):
            assert torch.equal(first(x), 2 * (expected + 1))
        assert torch.equal(first(x), expected + 1)
    assert "forward" not in first.__dict__ and torch.equal(first(x), expected)


def test_what_is_held_is_back_also_after_an_exception():
    class Owner:
        name = "of the class"

    owner = Owner()
    with pytest.raises(RuntimeError), held(owner, "name", "mine"):
        assert owner.name == "mine" and Owner().name == "of the class"
        raise RuntimeError
    assert owner.name == "of the class" and not owner.__dict__
    owner.name = "its own"
    with held(owner, "name", "mine"):
        pass
    assert owner.name == "its own"


def test_a_function_is_copied_with_other_globals():
    class Owner:
        def method(self, x, *, y=2):
            return [holds for _ in range(1)], x, y, self, __class__

    owner = Owner()
    copied = with_globals(owner.method, holds="another")
    assert copied(1) == (["another"], 1, 2, owner, Owner) and owner.method(1)[0] == [holds]
    assert reads_global(Owner.method.__code__, "holds") and not reads_global(Owner.method.__code__, "held")


# what upstream has


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda cls: cls.__name__)
def test_a_pipelines_call_can_be_made_with_gradients(pipeline):
    row, inner = "pipeline.__call__", call_of(pipeline)
    holds(inner is not pipeline.__call__, row, f"{pipeline.__name__}.__call__ is no wrapper with __wrapped__ any more, so torch.no_grad cannot be taken off.")
    holds(inspect.signature(inner) == inspect.signature(pipeline.__call__), row, f"{pipeline.__name__}.__call__ hides the signature of what it wraps.")
    holds("no_grad" not in inner.__code__.co_names, row, f"{pipeline.__name__}.__call__ switches autograd off inside, where nothing takes it off.")


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda cls: cls.__name__)
def test_a_pipelines_call_uses_the_methods_that_we_replace(pipeline):
    names, prepare = call_of(pipeline).__code__.co_names, inspect.unwrap(pipeline.prepare_latents)
    for method in ("encode_prompt", "prepare_latents"):
        holds(method in names, method, f"{pipeline.__name__}.__call__ does not use self.{method} any more.")
    holds("decode" in names, "vae.decode", f"{pipeline.__name__}.__call__ does not use self.vae.decode any more.")
    holds("step" in names, "scheduler.__class__", f"{pipeline.__name__}.__call__ does not use self.scheduler.step any more.")
    holds(reads_global(prepare.__code__, "randn_tensor"), "prepare_latents", f"{pipeline.__name__}.prepare_latents draws otherwise than by randn_tensor.")
    holds(prepare is pipeline.prepare_latents, "prepare_latents", f"{pipeline.__name__}.prepare_latents is decorated, and a copy of it would lose that.")


@pytest.mark.parametrize("family", ["StableDiffusion3", "StableDiffusionXL", "QwenImage", "Wan", "LTX"])
def test_a_modular_pipelines_blocks_are_what_we_copy(family):
    if not hasattr(diffusers, f"{family}ModularPipeline"):
        pytest.skip("this diffusers has no such pipeline")
    row, pipeline = "`_blocks` of a modular pipeline", getattr(diffusers, f"{family}ModularPipeline")()
    holds(isinstance(vars(pipeline).get("_blocks"), diffusers.ModularPipelineBlocks), row, "ModularPipeline keeps its blocks elsewhere than in _blocks.")
    holds(reads_global(call_of(type(pipeline)).__code__, "_blocks"), row, "ModularPipeline.__call__ does not run self._blocks any more.")
    holds(len(list(leaves(pipeline._blocks))) > 3, row, "Blocks do not hold their parts in sub_blocks any more.")
    names = [part for part in pipeline._blocks.sub_blocks if "scheduler" in pipeline._blocks.sub_blocks[part].component_names]
    holds(names == ["denoise"], row, f"The scheduler is a component of {names}: what comes after the last of them is taken for the tail.")


@pytest.mark.parametrize("name", ["ClassifierFreeGuidance", "AdaptiveProjectedGuidance", "SkipLayerGuidance", "TangentialClassifierFreeGuidance"])
def test_a_guider_keeps_its_settings_where_we_set_them(name):
    settings = {"skip_layer_guidance_layers": [0]} if name.startswith("Skip") else {}
    guider = getattr(diffusers, name)(**settings)
    for field in ("guidance_scale", "start", "stop", "enabled"):
        holds({field, f"_{field}"} & set(vars(guider)), "Guiders", f"{name} keeps {field} neither as {field} nor as _{field}.")
    batch = guider.prepare_inputs({"x": (torch.zeros(1), torch.ones(1))})[0]
    holds(batch[guider._identifier_key] == "pred_cond", "_identifier_key", f"{name}'s first prediction is not the conditional one, pred_cond, any more.")


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_a_schedulers_step_has_the_arguments_that_we_bind(scheduler):
    row, parameters = "scheduler.__class__", list(inspect.signature(scheduler.step).parameters)
    holds(parameters[:4] == ["self", "model_output", "timestep", "sample"], row, f"{scheduler.__name__}.step takes {', '.join(parameters)} now.")
    holds("return_dict" in parameters, row, f"{scheduler.__name__}.step has no return_dict any more.")
    holds(hasattr(scheduler, "set_timesteps"), row, f"{scheduler.__name__} has no set_timesteps any more.")
    instance = scheduler()
    try:
        instance.__class__ = type(scheduler.__name__, (scheduler,), {})
    except TypeError as error:
        holds(False, row, f"The class of a {scheduler.__name__} cannot be replaced by a subclass any more: {error}.")


def test_a_modules_own_forward_is_what_its_call_runs():
    module = nn.Linear(1, 1)
    with replaced(module, "forward", lambda forward, x: "ours"):
        holds(module(torch.zeros(1)) == "ours", "forward", "torch.nn.Module.__call__ does not use the forward of the instance any more.")


def test_torch_keeps_parts_and_hooks_where_we_look():
    module, row = nn.Sequential(nn.Linear(1, 1)), "Attributes that a call leaves behind"
    for name in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
        holds(isinstance(module.__dict__.get(name), dict), row, f"torch.nn.Module keeps no {name} any more.")
    holds(isinstance(module[0].__dict__.get("_parameters"), dict), "_modules", "torch.nn.Module keeps no _parameters any more.")
    holds(isinstance(torch.zeros(1)._version, int), "_version", "Tensors count no versions any more.")
    for name in ("tree_flatten", "tree_unflatten", "tree_leaves", "tree_map", "tree_map_only"):
        holds(hasattr(torch.utils._pytree, name), "_pytree", f"torch.utils._pytree has no {name} any more.")
    holds(hasattr(torch, "_foreach_lerp_"), "_foreach_lerp_", "torch has no _foreach_lerp_ any more.")
    holds(not torch.zeros(1)._is_view() and torch.zeros(2)[:1]._is_view(), "_is_view", "Tensor._is_view does not tell views any more.")
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), lambda step: 1.0)
    holds(schedule._last_lr == [1.0] and schedule._step_count == 1, "_last_lr", "torch's learning-rate schedules keep _last_lr and _step_count otherwise.")


def test_wrappers_keep_the_module_where_we_look():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    row = "Wrappers around a denoiser"
    holds("_orig_mod" in torch.compile(nn.Linear(1, 1))._modules, row, "torch.compile does not keep the module as _orig_mod any more.")
    holds(_common_utils.FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module", row, "FSDP keeps the module under another name.")
    holds("_checkpoint_wrapped_module" in checkpoint_wrapper.checkpoint_wrapper(nn.Linear(1, 1))._modules, row, "checkpoint_wrapper has another name for it.")


def test_attention_goes_by_the_back_end_that_we_set():
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    row = "_attention_backend"
    holds(hasattr(FluxAttnProcessor, row), row, "FLUX's attention processor does not keep its back end in _attention_backend any more.")
    source = inspect.getsource(diffusers.ModelMixin.set_attention_backend)
    holds(f"processor.{row} = backend" in source, row, "set_attention_backend sets something else than a processor's _attention_backend.")


def test_hooks_are_where_we_look():
    from accelerate.hooks import AlignDevicesHook, CpuOffload, add_hook_to_module
    from diffusers.hooks import ModelHook
    from diffusers.models.cache_utils import CacheMixin

    module = nn.Linear(1, 1)
    HookRegistry.check_if_exists_or_initialize(module)
    holds(isinstance(module._diffusers_hook.hooks, dict), "_diffusers_hook", "diffusers keeps its hooks elsewhere than in module._diffusers_hook.hooks.")
    holds(hasattr(ModelHook, "_is_stateful"), "_is_stateful", "diffusers' hooks do not say any more whether they have a state.")
    holds(hasattr(CacheMixin, "_cache_config"), "_cache_config", "diffusers' models do not keep a cache's settings in _cache_config any more.")
    holds(hasattr(add_hook_to_module(nn.Linear(1, 1), AlignDevicesHook()), "_hf_hook"), "_hf_hook", "accelerate keeps its hooks elsewhere than in _hf_hook.")
    holds(inspect.isclass(CpuOffload), "_hf_hook", "accelerate has no CpuOffload any more.")
    for name in ("_execution_device", "maybe_free_model_hooks"):
        holds(hasattr(DiffusionPipeline, name), name, f"DiffusionPipeline has no {name} any more.")


def test_what_is_spared_is_nothing_without_hooks():
    row, names = "device", {"components", "_all_hooks", "enable_model_cpu_offload", "_reset_stateful_cache", "_offload_device", "get_device"}
    read = {name for name in DiffusionPipeline.maybe_free_model_hooks.__code__.co_names if not hasattr(builtins, name)}
    holds(read - {"values"} <= names, row, f"DiffusionPipeline.maybe_free_model_hooks reads {sorted(read - names)} now.")
    modules = inspect.getsource(HookRegistry.reset_stateful_hooks)
    holds("_is_stateful" in modules, row, "HookRegistry.reset_stateful_hooks resets other hooks than those with a state.")


def test_a_lora_layer_reads_its_switches():
    model = inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"], init_lora_weights=False), nn.Sequential(nn.Linear(1, 1, bias=False)), "own")
    layer, x = model[0], torch.ones(1, 1)
    bare = layer.base_layer(x)
    holds(not torch.equal(model(x), bare), "_disable_adapters", "A LoRA without init has no effect.")
    for name, value in (("_disable_adapters", True), ("_active_adapter", [])):
        with held(layer, name, value):
            holds(torch.equal(model(x), bare), name, f"peft's layers do not read {name} in their forward pass any more.")


def test_the_progress_bar_reads_what_we_hold():
    pipeline = type("Pipeline", (DiffusionPipeline,), {})()
    with held(pipeline, "_progress_bar_config", {"disable": True}):
        holds(pipeline.progress_bar(total=1).disable, "_progress_bar_config", "DiffusionPipeline.progress_bar does not read _progress_bar_config any more.")


def test_a_pipeline_without_safety_checker_asks_none():
    check = diffusers.StableDiffusionPipeline.run_safety_checker
    holds("safety_checker" in check.__code__.co_names, "safety_checker", "run_safety_checker does not look at self.safety_checker any more.")
    blank = torch.zeros(1), None
    found = check(type("Pipeline", (), {"safety_checker": None})(), blank[0], "cpu", torch.float32)
    holds(found == blank, "safety_checker", "run_safety_checker with self.safety_checker None does not leave pictures as they are.")


def test_schedulers_keep_their_position_where_we_look():
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(3)
    flow._init_step_index(flow.timesteps[0])
    holds(flow._step_index == flow.step_index == 0, "_step_index", "FlowMatchEulerDiscreteScheduler._init_step_index does not set _step_index any more.")
    holds(hasattr(flow, "_begin_index"), "_step_index", "Schedulers keep no _begin_index any more.")
    edm = diffusers.EDMEulerScheduler()
    edm.set_timesteps(3)
    edm.sigmas, edm._step_index = edm.sigmas * 2, 1
    scaled = edm.scale_model_input(torch.ones(1), edm.timesteps[1])
    holds(torch.equal(scaled, edm.precondition_inputs(torch.ones(1), edm.sigmas[1])), "_step_index", "EDMEulerScheduler reads its level elsewhere.")
    names = list(inspect.signature(DDIMScheduler._get_variance).parameters)
    holds(names == ["self", "timestep", "prev_timestep"], "_get_variance", f"DDIMScheduler._get_variance takes {names} now.")
    holds(isinstance(vars(flow).get("_internal_dict"), dict), "_internal_dict", "Configs are kept elsewhere than in _internal_dict.")
    holds("_get_compatibles" in vars(diffusers.SchedulerMixin), "_get_compatibles", "SchedulerMixin has no _get_compatibles any more.")


def test_pipelines_that_ask_for_clean_samples_are_found():
    asks = {cls.__name__ for cls in (diffusers.CosmosTextToWorldPipeline, diffusers.StableVideoDiffusionPipeline) if _asks_first(calls_of(object.__new__(cls)))}
    holds(asks == {"CosmosTextToWorldPipeline"}, "co_consts", f"Of Cosmos 1 and Stable Video Diffusion, {asks or 'none'} ask for clean samples first.")
    code = inspect.getsource(inspect.unwrap(diffusers.CosmosTextToWorldPipeline.__call__))
    holds("self.scheduler._step_index -= 1" in code, "co_consts", "Cosmos 1 takes the step that asks back in another way.")


# Of DiffusionPipeline and what it inherits: those that build or load, which a wrapper either writes itself or inherits on purpose.
OF_THE_CLASS = {
    "_dict_from_json_file", "_get_config_file_from_dduf", "_get_init_keys", "_get_signature_keys", "_get_signature_types", "download", "extract_init_dict",
    "from_config", "from_pipe", "from_pretrained", "get_config_dict", "load_config", "numpy_to_pil", "register_for_auto_class",
}  # fmt: skip


def test_whatever_a_pipeline_has_is_forwarded_to_the_one_inside():
    row, members = "Members of DiffusionPipeline", {n: m for cls in DiffusionPipeline.__mro__[-2::-1] for n, m in vars(cls).items() if not n.startswith("__")}
    of_the_class = {name for name, member in members.items() if isinstance(member, (classmethod, staticmethod))}
    holds(of_the_class <= OF_THE_CLASS, row, f"DiffusionPipeline has new class methods, {sorted(of_the_class - OF_THE_CLASS)}: does a wrapper need them?")
    own = {name for name, member in members.items() if inspect.isfunction(member) or isinstance(member, property)}
    missing = sorted(name for name in own if vars(WrappedPipeline).get(name) in (None, members[name]))
    holds(not missing, row, f"{missing} of DiffusionPipeline are not forwarded to the pipeline inside.")
    holds(isinstance(DiffusionPipeline._optional_components, list), "_optional_components", "DiffusionPipeline has no list of optional components any more.")
    keys = DiffusionPipeline._get_signature_keys(diffusers.StableDiffusionPipeline)
    holds(len(keys) == 2 and "unet" in keys[0], "_get_signature_keys", "DiffusionPipeline._get_signature_keys returns something else.")
    holds("config_dict" in inspect.signature(DiffusionPipeline.extract_init_dict).parameters, row, "DiffusionPipeline.extract_init_dict takes something else.")


def test_diffusers_loads_what_is_registered():
    from diffusers.pipelines import pipeline_loading_utils

    row, classes = "LOADABLE_CLASSES", getattr(pipeline_loading_utils, "LOADABLE_CLASSES", {})
    holds(classes.get("diffusers", {}).get("SchedulerMixin") == ["save_pretrained", "from_pretrained"], row, "LOADABLE_CLASSES has another form.")
    holds("SchedulerMixin" in classes.get("diffusers_align", {}), row, "Our schedulers are not registered, so pipelines saved with one do not load.")


def test_adapters_are_where_we_look():
    from diffusers.loaders.peft import PeftAdapterMixin

    holds(hasattr(PeftAdapterMixin, "_hf_peft_config_loaded"), "_hf_peft_config_loaded", "PeftAdapterMixin keeps no _hf_peft_config_loaded any more.")
    loadable = getattr(diffusers.StableDiffusionPipeline, "_lora_loadable_modules", ())
    holds("unet" in loadable, "_lora_loadable_modules", "Pipelines do not say in _lora_loadable_modules which models take a LoRA any more.")
    writes = inspect.signature(diffusers.StableDiffusionPipeline.save_lora_weights).parameters
    holds({"unet_lora_layers", "unet_lora_adapter_metadata"} <= set(writes), "_lora_layers", "save_lora_weights takes other arguments.")
    widens = inspect.signature(getattr(diffusers.WanPipeline, "_maybe_expand_t2v_lora_for_i2v", print)).parameters
    holds(list(widens) == ["transformer", "state_dict"], "_maybe_expand_t2v_lora_for_i2v", "The loader of WanPipeline widens LoRAs by another method.")
    can = hasattr(diffusers.ModelMixin, "_supports_gradient_checkpointing")
    holds(can, "_supports_gradient_checkpointing", "Models do not say in _supports_gradient_checkpointing whether they can any more.")


def test_accelerate_reads_the_variable_that_switches_its_fsdp_off():
    source = Path(accelerate.state.__file__).read_text() + Path(accelerate.accelerator.__file__).read_text()
    holds("ACCELERATE_USE_FSDP" in source, "ACCELERATE_USE_FSDP", "accelerate does not read ACCELERATE_USE_FSDP any more.")


def test_a_modules_weights_are_cast_by_what_we_replace():
    layer, seen = nn.Linear(2, 2), []
    layer.__dict__["_apply"] = lambda convert, recurse=True: seen.append(convert(layer.weight).dtype) or layer
    layer.to(torch.bfloat16)
    holds(seen == [torch.bfloat16], "Models of a plan", "nn.Module.to casts weights otherwise than by `_apply`.")
