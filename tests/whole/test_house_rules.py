"""What every file promises: layers, pages, tests, sizes."""

import ast
import functools
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffusers_align"
MODULES = sorted(PACKAGE.rglob("*.py"))
ALGORITHMS = sorted(path.stem for path in (PACKAGE / "algorithms").glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(path.stem for path in (ROOT / "training_scripts").glob("train_*.py"))
MAX_FUNCTION, MAX_FILE, MEDIAN_FILE = 50, 335, 150

# What each part of the package may import of the package: dependencies point one way.
NOUNS = {"condition", "trajectory", "transition"}
BELOW_POLICY = NOUNS | {"checks", "driving", "files", "forward_process", "lora", "schedulers"}
LAYERS = {
    "moved": set(),
    "checks": set(),
    "data": set(),
    "embedded": set(),
    "files": {"checks"},
    "transition": set(),
    "condition": set(),
    "trajectory": {"condition", "transition"},
    "rl": {"transition"},
    "algorithms": {"checks", "rl", "transition"},
    "schedulers": {"checks", "files", "transition"},
    "driving": NOUNS | {"checks", "schedulers"},
    "lora": {"checks", "driving", "files"},
    "forward_process": {"schedulers"},
    "policy": BELOW_POLICY,
    "gradients": {"policy"} | BELOW_POLICY,
    "rewards": {"checks", "data", "embedded", "files"},
    "pipelines": {"algorithms", "data", "gradients", "policy", "rewards", "rl"} | BELOW_POLICY,
    "envs": {"pipelines", "policy", "rewards"} | BELOW_POLICY,
    "training": {"algorithms", "data", "embedded", "gradients", "policy", "rewards", "rl"} | BELOW_POLICY,
    "__init__": {"embedded", "gradients", "policy"} | BELOW_POLICY,
    "plan": {"algorithms", "data", "files", "gradients", "policy", "training"} | BELOW_POLICY,
    "__main__": {"files", "plan"},
}
MODEL_FAMILIES = re.compile(r"flux|stable_?diffusion|sdxl|qwen|wan2|sana|pixart|lumina|cogvideo|hunyuan", re.IGNORECASE)
FAMILY_FREE = [
    "policy", "condition", "trajectory", "transition", "forward_process", "lora", "files/lora_finder", "schedulers/kernels",
    *sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for room in ("driving", "envs", "gradients") for path in (PACKAGE / room).glob("*.py")),
    "pipelines/adapter_guidance", "pipelines/guided_sampling", "pipelines/noise_grid", "pipelines/noise_optimization", "pipelines/recurrence",
    "pipelines/reward_guided", "pipelines/value_steering",
]  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def part_of(path: Path) -> str:
    """`rl` of rl/advantages.py, `policy` of policy.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@functools.cache
def imports(path: Path) -> set[str]:
    """Absolute names of what a module, a test or a script imports, also inside functions."""
    package = ["diffusers_align", *path.relative_to(PACKAGE).parts[:-1]] if path.is_relative_to(PACKAGE) else []
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imported_parts(path: Path) -> set[str]:
    ours = (name.split(".") for name in imports(path) if name.startswith("diffusers_align."))
    return {part for _, part, *_ in ours if not part.startswith("__")} - {part_of(path)}


def definitions(tree: ast.AST) -> list:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


# layers


def test_relative_imports_are_resolved():
    assert "diffusers_align.rl.importance.clipped_surrogate" in imports(PACKAGE / "algorithms" / "ddpo.py")
    assert imported_parts(PACKAGE / "algorithms" / "ddpo.py") == {"rl"}
    assert {"driving", "schedulers", "transition"} <= imported_parts(PACKAGE / "policy.py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_dependencies_point_one_way(path):
    assert part_of(path) in LAYERS, "say in LAYERS what the new part may import"
    assert imported_parts(path) - {"moved"} <= LAYERS[part_of(path)]  # old names may lead anywhere


def test_layers_hold_no_cycle():
    placed: set[str] = set()
    while free := {part for part, below in LAYERS.items() if part not in placed and below <= placed}:
        placed |= free
    assert placed == set(LAYERS)


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) in ("algorithms", "rl")], ids=name_of)
def test_mathematics_imports_torch_alone(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots <= {"torch", "diffusers_align"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_imports_no_script_or_front_door(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"training_scripts", "pipelines", "schedulers", "tests", "benchmarks", *SCRIPTS}


@pytest.mark.parametrize("name", FAMILY_FREE)
def test_the_core_names_no_model_family(name):
    lines = (PACKAGE / f"{name}.py").read_text().splitlines()
    assert [line for line in lines if MODEL_FAMILIES.search(line)] == []


PURE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_importing_the_mathematics_imports_torch_alone():
    names = [f"diffusers_align.{module_of(path)}" for path in MODULES if part_of(path) in ("algorithms", "rl")]
    result = subprocess.run([sys.executable, "-c", PURE, *names], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout.split()
    assert not {"diffusers", "peft", "accelerate", "transformers"} & set(result.stdout.split())


# pages, tests and scripts


def test_there_are_algorithms_and_scripts():
    assert {"reinforce", "ddpo", "flow_grpo"} <= set(ALGORITHMS)
    assert {"train_ddpo", "train_flow_grpo"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_has_a_page_that_states_its_source(name):
    page = ast.get_docstring(ast.parse((PACKAGE / "algorithms" / f"{name}.py").read_text())) or ""
    assert "https://arxiv.org/abs/" in page or "Source:" in page
    assert "$$" in page, "the objective is missing"


SNAPSHOT = re.compile(r"\b[0-9a-f]{7}\b|\b(?:hpsv2|image-reward) \d\.\d|There is no official code")
COMPARED = [path for path in MODULES if part_of(path) in ("algorithms", "rewards", "pipelines", "schedulers", "rl")]


@pytest.mark.parametrize("path", COMPARED, ids=name_of)
def test_official_code_is_named_by_its_snapshot(path):
    pages = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    if any("as in the official" in page.lower() or "official code" in page for page in pages):
        assert SNAPSHOT.search("\n".join(pages)), "which snapshot was it compared with?"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_is_in_the_index(name):
    index = ast.get_docstring(ast.parse((PACKAGE / "algorithms" / "__init__.py").read_text()))
    assert f"`{name}`" in index


@pytest.mark.parametrize("name", ALGORITHMS + SCRIPTS)
def test_each_algorithm_and_script_is_in_the_table_of_algorithms(name):
    assert re.search(rf"\b{name}\b", (ROOT / "docs" / "algorithms" / "index.md").read_text())


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().split()) < 900  # code and tables included


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_has_tests_and_a_row_in_the_contract(name):
    others = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    assert f"diffusers_align.algorithms.{name}" in others
    assert f"diffusers_align.algorithms.{name}" in (ROOT / "tests" / "whole" / "test_contract.py").read_text()


# Public functions of the mathematics that nothing here calls: methods for users' own loops, and what they return or are given.
LIBRARY_ONLY = {"algorithms.discrete_adjoint_matching": "for models over tokens, which no pipeline here is"}


def defined_and_used() -> tuple[set[str], set[str]]:
    """Public functions of algorithms and rl, as `rl.returns.gae`, and those of them that the package, a script or the oracle's table uses by name."""
    others = (ROOT / "training_scripts", ROOT / "pipelines", ROOT / "benchmarks" / "oracle")
    trees = {path: ast.parse(path.read_text()) for path in (*MODULES, *(path for folder in others for path in folder.glob("*.py")))}
    defined, used = set(), set()
    for path, tree in trees.items():
        if path in MODULES and part_of(path) in ("algorithms", "rl"):
            defined |= {f"{module_of(path)}.{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    for path, tree in trees.items():
        names = names_in(path, tree, {name.rpartition(".")[0] for name in defined})
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used |= names.get(node.id, set())
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {f"{name}.{node.attr}" for name in names.get(node.value.id, ())}
    return defined, used


def module_of(path: Path) -> str:
    return name_of(path).replace("/", ".").removesuffix(".__init__")


def names_in(path: Path, tree: ast.AST, modules: set[str]) -> dict[str, set[str]]:
    """What a file's names may stand for; those of a package that hands them on, for those of each of its modules."""
    package = ["diffusers_align", *path.relative_to(PACKAGE).parts[:-1]] if path in MODULES else []
    own = {node.name: {f"{module_of(path)}.{node.name}"} for node in tree.body if isinstance(node, ast.FunctionDef)} if path in MODULES else {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")] if node.level else node.module.split(".")
            source = ".".join(part for part in base if part).removeprefix("diffusers_align.")
            for alias in node.names:
                handed_on = {f"{module}.{alias.name}" for module in modules if module.startswith(f"{source}.")}
                own[alias.asname or alias.name] = {f"{source}.{alias.name}"} | handed_on
    return own


def test_the_mathematics_has_users():
    """Every public function of algorithms and rl is called by the package, a script or the oracle's table: what only tests call describes nothing that
    runs."""
    defined, used = defined_and_used()
    assert {"rl.returns.gae", "algorithms.refl.refl_loss"} <= used & defined
    unused = {name for name in defined - used if name.rpartition(".")[0] not in LIBRARY_ONLY}
    assert unused == set()
    assert set(LIBRARY_ONLY) <= {name.rpartition(".")[0] for name in defined}


# tests lie where what they test lies

TESTS = ROOT / "tests"
# Rooms of tests that mirror no module of the package: what spans rooms, the documentation, the benchmarks.
NOT_MIRRORED = {"benchmarks", "docs", "support", "whole"}
# Modules without a test file of their own: thin pieces, and pieces that only make sense with a neighbour. Module -> the file that tests it.
TESTED_WITH = {
    "algorithms/ddpo": "algorithms/test_algorithms",
    "algorithms/reinforce": "algorithms/test_algorithms",
    "checks/given_names": "training/run/test_model_loading",
    "driving/arguments": "driving/test_driver",
    "driving/denoisers": "driving/test_wrappers",
    "driving/prompt_rows": "driving/test_prompt_memory",
    "driving/replacements": "whole/test_patches",
    "driving/scheduler_hook": "driving/test_driver",
    "driving/tape": "whole/test_precision",
    "embedded/noisy_classifier": "pipelines/test_reward_guided",
    "embedded/noisy_trunk": "embedded/test_noisy_clip",
    "files/weight_files": "test_lora",
    "gradients/walk": "gradients/test_rollout",
    "pipelines/guided_sampling": "pipelines/test_reward_guided",
    "plan/advice": "plan/test_planner",
    "plan/report": "plan/test_planner",
    "plan/steps": "plan/test_command",
    "pipelines/outputs": "pipelines/test_best_of_n",
    "pipelines/particles": "pipelines/test_particle_steering",
    "rewards/learned": "training/offline/test_reward_fitting",
    "rewards/contents": "training/checkpoints/test_allowed_changes",
    "training/checkpoints/state_adapters": "training/checkpoints/test_checkpoints",
    "training/flags/command_line": "training/flags/test_options",
    "training/flags/data": "training_scripts/test_train_dpo",
    "training/flags/methods": "training_scripts/test_train_flow_grpo",
    "training/flags/model": "training/flags/test_common",
    "training/flags/option_types": "training/flags/test_options",
    "training/flags/task": "training/flags/test_common",
    "training/offline/data_latents": "training_scripts/test_train_dpo",
    "training/offline/descent": "training_scripts/test_train_dpo",
    "training/offline/pairs_and_batches": "training_scripts/test_train_dpo",
    "training/offline/held_out_pairs": "training_scripts/test_evaluate",
    "training/offline/made_preferences": "training_scripts/test_make_preferences",
    "training/offline/noised_latents": "training_scripts/test_train_dpo",
    "training/offline/rows": "training_scripts/test_train_dpo",
    "training/offline/loop": "training_scripts/test_train_dpo",
    "training/online/forward_samples": "training_scripts/test_train_nft",
    "training/online/step_candidates": "training_scripts/test_train_d3po",
    "training/online/stored_trajectories": "training_scripts/test_train_d3po",
    "training/online/value_replay": "training_scripts/test_train_value_steering",
    "training/online/trained_steps": "training_scripts/test_train_flow_grpo",
    "training/report/comparison": "training_scripts/test_evaluate",
    "training/report/evaluation": "training_scripts/test_evaluate",
    "training/report/hub": "training/report/test_model_card",
    "training/run/metrics": "training/run/test_run",
    "training/run/single_file": "training/run/test_model_loading",
    "training/run/symptoms": "training/run/test_health",
}
# What no test runs: it trains the embedded models, which embedded/test_embedded judges.
NOT_RUN = {"embedded/making/autoencoder", "embedded/making/clips", "embedded/making/judges"}


def places_of_tests() -> set[str]:
    """Every place that a test file may be named for: a module, a script, or a room as a whole (rewards/rewards)."""
    modules = {name_of(path) for path in MODULES if path.stem != "__init__"}
    rooms = {f"{name_of(path.parent)}/{path.parent.name}" for path in MODULES if path.stem == "__init__" and path.parent != PACKAGE}
    return modules | rooms | {f"training_scripts/{path.stem}" for path in (ROOT / "training_scripts").glob("*.py")} | {"training_scripts/training_scripts"}


def test_each_test_file_is_named_for_what_it_tests():
    files = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in NOT_MIRRORED]
    assert [str(path) for path in files if (path.parent / path.stem.removeprefix("test_")).as_posix() not in places_of_tests()] == []


@pytest.mark.parametrize("module", [name_of(path) for path in MODULES if path.stem != "__init__" and name_of(path) not in NOT_RUN])
def test_each_module_has_its_tests(module):
    own = TESTS / Path(module).parent / f"test_{Path(module).name}.py"
    if own.exists():
        assert module not in TESTED_WITH, f"{own.relative_to(ROOT)} is there: drop the entry of TESTED_WITH"
    else:
        assert module in TESTED_WITH, f"write {own.relative_to(ROOT)}, or say in TESTED_WITH which file tests it"
        assert reaches(TESTS / f"{TESTED_WITH[module]}.py", PACKAGE / f"{module}.py")


@functools.cache
def used(path: Path) -> frozenset[Path]:
    """The modules of the package that a module, a test or a script imports, through the rooms that hand their names on."""
    by_name = {f"diffusers_align.{module_of(module)}": module for module in MODULES}
    found = {by_name.get(name) or by_name.get(name.rpartition(".")[0]) for name in imports(path)} - {None, PACKAGE / "__init__.py"}
    rooms = {module for module in found if module.stem == "__init__"}
    return frozenset(found.union(*(used(room) for room in rooms)) if path not in rooms else found)


def reaches(test: Path, module: Path) -> bool:
    """Does the test, or the script that it tests, use the module, itself or through one that does?"""
    script = ROOT / "training_scripts" / f"{test.stem.removeprefix('test_')}.py"
    near = used(test) | (used(script) if script.exists() else set())
    return module in near or any(module in used(neighbour) for neighbour in near)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_has_a_test(name):
    # by its file's name, or by its algorithm's where that names the file
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    assert re.search(rf'\b{name}\b|"{name.removeprefix("train_")}"', tests)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_functions_and_classes_have_docstrings(path):
    public = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_have_docstrings(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def importers_of(path: Path) -> set[str]:
    """Which files of the package and of the scripts import a module."""
    name = "diffusers_align." + module_of(path)
    parent, _, stem = name.rpartition(".")
    found = {other.name for other in MODULES if other != path and any(i == name or i.startswith(f"{name}.") for i in imports(other))}
    for script in (ROOT / "training_scripts").glob("*.py"):
        text = script.read_text()
        if re.search(rf"^\s*from {re.escape(name)} import|^\s*from {re.escape(parent)} import .*\b{stem}\b", text, re.MULTILINE):
            found.add(script.name)
    return found


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) == "training" and path.stem != "__init__"], ids=name_of)
def test_a_module_of_one_script_says_why(path):
    """What one script alone imports could stand in it: the module's page names the script, and the reason."""
    importers = importers_of(path)
    assert importers, "nobody imports it"
    if len(importers) == 1 and (ROOT / "training_scripts" / (script := next(iter(importers)))).exists():
        assert f"{script}" in (ast.get_docstring(ast.parse(path.read_text())) or "")


# sizes


READ = [*MODULES, *(ROOT / "training_scripts" / f"{name}.py" for name in SCRIPTS), *(ROOT / "benchmarks").rglob("*.py")]


def lines_of(function: ast.FunctionDef) -> int:
    """How many lines a function has beside its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


@pytest.mark.parametrize("path", READ, ids=lambda path: path.stem)
def test_functions_and_files_can_be_read_at_one_sitting(path):
    source = path.read_text()
    lengths = [(f.name, lines_of(f)) for f in definitions(ast.parse(source))]  # a list: classes share method names
    assert [(name, length) for name, length in lengths if length > MAX_FUNCTION] == []
    assert len(source.splitlines()) <= MAX_FILE


def test_most_files_are_short():
    assert statistics.median(len(path.read_text().splitlines()) for path in READ) < MEDIAN_FILE


# imports

MEASURE = """
import sys, time
import peft
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
before, start = set(sys.modules), time.process_time()
from diffusers_align import *
seconds = time.process_time() - start
print(seconds, *sorted(set(sys.modules) - before))
"""


@pytest.mark.slow
def test_importing_the_package_is_quick_and_pulls_nothing_heavy():
    result = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    seconds, *modules = result.stdout.splitlines()[-1].split()
    assert float(seconds) < 1.0
    assert "diffusers_align.policy" in modules
    heavy = {"matplotlib", "datasets", "wandb", "tensorboard", "trackio", "scipy", "torchvision", "cv2", "pandas"}
    assert not heavy & {name.split(".")[0] for name in modules}
    assert not {name for name in modules if name.startswith(("diffusers_align.rewards", "diffusers_align.training", "diffusers_align.data"))}
