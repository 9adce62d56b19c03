"""The package installs as wheel, sdist, folder and editable, and brings its front doors along."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from diffusers_align import __version__
from diffusers_align.__main__ import main
from diffusers_align.files.paths import find_recipe, front_door, names

ROOT = Path(__file__).parents[2]
FRONT_DOORS = [
    p.relative_to(ROOT).as_posix()
    for kind in ("pipelines", "schedulers", "training_scripts")
    for p in (ROOT / kind).rglob("*")
    if p.is_file() and "__pycache__" not in p.parts
]
USE = """
import diffusers_align
from diffusers_align import FlowMatchSDEScheduler, apply_recipe
from diffusers_align.files.paths import front_door
assert front_door("training_scripts", "train_ddpo").is_file()
class Pipeline: scheduler = FlowMatchSDEScheduler(shift=3.0)
assert apply_recipe(Pipeline(), "cps").scheduler.config.sde_type == "cps"
print(diffusers_align.__file__)
"""


def python(*args, cwd, **env):
    result = subprocess.run([sys.executable, *args], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", str(folder), str(ROOT), cwd=folder)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.mark.slow
def test_wheel_and_sdist_hold_everything(built):
    wheel, sdist = built
    inside = zipfile.ZipFile(wheel).namelist()
    assert "diffusers_align/py.typed" in inside and "diffusers_align/embedded/mini-sd3/model_index.json" in inside
    for path in FRONT_DOORS:
        assert f"diffusers_align/shipped/{path}" in inside
    packed = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    assert {*FRONT_DOORS, "LICENSE", "README.md", "Makefile", "tests/whole/test_packaging.py", "diffusers_align/py.typed"} <= packed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "folder"])
def test_an_installed_copy_works_from_a_clean_folder_and_from_the_repository_root(built, kind, tmp_path):
    source = {"wheel": str(built[0]), "sdist": str(built[1]), "folder": str(ROOT)}[kind]
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), source, cwd=tmp_path)
    clean = tmp_path / "clean"
    clean.mkdir()
    assert str(tmp_path / "site") in python("-c", USE, cwd=clean, PYTHONPATH=str(tmp_path / "site"))
    python("-c", USE, cwd=ROOT, PYTHONPATH=str(tmp_path / "site"))


@pytest.mark.slow
def test_an_editable_install_works_from_anywhere(tmp_path):
    python("-m", "venv", "--system-site-packages", str(tmp_path / "venv"), cwd=tmp_path)
    interpreter = tmp_path / "venv" / "bin" / "python"
    inherited = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    env = {**os.environ, "PYTHONPATH": inherited, "OMP_NUM_THREADS": "1"}
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", "-e", ROOT], check=True, env=env, cwd=tmp_path)
    printed = subprocess.run([interpreter, "-c", USE], check=True, env=env, cwd=tmp_path, capture_output=True, text=True).stdout
    assert printed.strip() == str(ROOT / "diffusers_align" / "__init__.py")


def test_the_command_line_lists_and_finds(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    assert "train_ddpo" in printed and "flow_grpo_fast" in printed
    main(["path", "train_flow_grpo"])
    assert Path(capsys.readouterr().out.strip()) == front_door("training_scripts", "train_flow_grpo")
    assert "ddpo_mini_sd" in printed.split("recipes: ")[1] and "recipes" not in printed.split("training_scripts: ")[1].splitlines()[0]
    main(["list", "recipes"])
    assert capsys.readouterr().out.startswith("recipes: ")
    for name in ("ddpo_mini_sd", "ddpo_mini_sd.yaml"):
        main(["path", name])
        assert Path(capsys.readouterr().out.strip()) == ROOT / "training_scripts" / "recipes" / "ddpo_mini_sd.yaml"
    main(["path", "recipes"])
    assert Path(capsys.readouterr().out.strip()) == ROOT / "training_scripts" / "recipes"
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"diffusers-align {__version__}\n"
    for name, message in (("nothing", "diffusers-align list"), ("train_ddpoo", "did you mean .*train_ddpo")):
        with pytest.raises(SystemExit):
            main(["path", name])
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["ddpo_mini_sd", "ddpo_mini_sd.yaml", "training_scripts/recipes/ddpo_mini_sd.yaml"])
def test_a_recipe_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == ROOT / "training_scripts" / "recipes" / "ddpo_mini_sd.yaml"
    own = tmp_path / "ddpo_mini_sd.yaml"
    own.write_text("rank: 4\n")
    assert find_recipe("ddpo_mini_sd.yaml") == Path("ddpo_mini_sd.yaml"), "a file of one's own comes first"
    assert find_recipe(str(own)) == own


def test_a_recipe_that_is_nowhere_is_named_with_those_near():
    for name in ("ddpo_mini_sdd", "other/ddpo_mini_sd.yaml"):
        with pytest.raises(FileNotFoundError, match="no recipe.*Did you mean .*ddpo_mini_sd.*diffusers-align list recipes"):
            find_recipe(name)


WITHOUT_TORCH = """
import sys
from diffusers_align.__main__ import main
main(["list"])
assert not {"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules)
import diffusers_align
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
assert "diffusers_align" in LOADABLE_CLASSES
assert diffusers_align.Policy is diffusers_align.policy.Policy and diffusers_align.schedulers.sde_twin is diffusers_align.sde_twin
assert set(diffusers_align.__all__) <= set(dir(diffusers_align))
"""


@pytest.mark.slow
def test_the_command_line_waits_for_no_torch_and_saved_schedulers_load_all_the_same():
    python("-c", WITHOUT_TORCH, cwd=ROOT)


def test_an_unknown_front_door_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match="flow_grpo_fast"):
        front_door("schedulers", "nothing")
    assert {"ddpo", "flow_grpo", "flow_grpo_fast", "dance_grpo", "cps", "memoryless"} <= set(names("schedulers"))
