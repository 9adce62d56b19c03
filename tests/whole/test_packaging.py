"""The package installs as wheel, sdist, folder and editable, and brings its front doors along."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
    for curve in (ROOT / "benchmarks" / "curves").glob("*.json"):
        assert f"diffusers_align/shipped/curves/{curve.name}" in inside, "the levels of recipes are read off it"
    packed = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    assert {*FRONT_DOORS, "LICENSE", "README.md", "Makefile", "tests/whole/test_packaging.py", "diffusers_align/py.typed"} <= packed


def install(source, folder):
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(source), cwd=folder.parent)
    return folder


def files_of(folder):
    """What was installed there, without pip's notes of where it came from."""
    own = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name not in ("RECORD", "direct_url.json"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in own}


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """Where the wheel is installed."""
    return install(built[0], tmp_path_factory.mktemp("installed") / "site")


@pytest.mark.slow
def test_an_installed_copy_works_from_a_clean_folder_and_from_the_repository_root(site, tmp_path):
    assert str(site) in python("-c", USE, cwd=tmp_path, PYTHONPATH=str(site))
    python("-c", USE, cwd=ROOT, PYTHONPATH=str(site))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sdist", "folder"])
def test_other_sources_install_the_same_copy(built, site, kind, tmp_path):
    """Byte for byte, so what works of the wheel's works of theirs."""
    assert files_of(install({"sdist": built[1], "folder": ROOT}[kind], tmp_path / "site")) == files_of(site)


@pytest.mark.long
def test_an_editable_install_works_from_anywhere(tmp_path):
    python("-m", "venv", "--system-site-packages", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)  # pip is inherited, too
    interpreter = tmp_path / "venv" / "bin" / "python"
    inherited = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    env = {**os.environ, "PYTHONPATH": inherited, "OMP_NUM_THREADS": "1"}
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", "-e", ROOT], check=True, env=env, cwd=tmp_path)
    printed = subprocess.run([interpreter, "-c", USE], check=True, env=env, cwd=tmp_path, capture_output=True, text=True).stdout
    assert printed.strip() == str(ROOT / "diffusers_align" / "__init__.py")


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
