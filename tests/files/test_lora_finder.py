"""LoRA files, also of other tools: found, read, refused."""

import json

import pytest
import torch
from lora_tools import WEIGHTS, drawn, stock, trained
from safetensors.torch import load_file, save_file
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, load_lora
from diffusers_align.files import lora_finder

# --- files of other tools ----------------------------------------------------------------------------------------------


def kohya(weights):
    """The same in kohya's keys."""
    found = {}
    for key, value in weights.items():
        base, half = key.removeprefix("unet.").split(".lora", 1)
        name = "lora_unet_" + base.replace(".", "_").replace("_processor", "")
        found[f"{name}.lora_{'down' if '_A' in half or '.down' in half else 'up'}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(4.0)
    return found


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with a LoRA, `ours`, and the same as `kohya`; and what the trained pipeline draws."""
    folder = tmp_path_factory.mktemp("foreign")
    expected = trained(FAMILIES["sd15"].build(), "sd15", folder / "ours", alpha=4)
    (folder / "kohya").mkdir()
    save_file(kohya(load_file(folder / "ours" / WEIGHTS)), folder / "kohya" / WEIGHTS)
    (folder / "named").mkdir()
    (folder / "named" / "my_style.safetensors").write_bytes((folder / "kohya" / WEIGHTS).read_bytes())
    return folder, expected


@pytest.mark.parametrize("path", ["ours", f"ours/{WEIGHTS}", "kohya", f"kohya/{WEIGHTS}", "named", "named/my_style.safetensors"])
def test_files_of_other_tools_load_from_a_folder_as_alone(foreign, path):
    from diffusers_align.training.report.evaluation import find_lora, lora_loaded

    folder, expected = foreign
    pipeline = FAMILIES["sd15"].build()
    base = drawn(pipeline, "sd15")
    with lora_loaded(pipeline, find_lora(str(folder / path)), "it"):
        torch.testing.assert_close(drawn(pipeline, "sd15"), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn(pipeline, "sd15"), base)
    policy = Policy(pipeline, **FAMILIES["sd15"].call)
    policy.add_lora(rank=4, alpha=4)
    policy.load_lora(folder / path)
    torch.testing.assert_close(drawn(stock(policy), "sd15"), expected, rtol=1e-5, atol=1e-5)


def test_a_lora_of_another_model_or_scale_is_refused(foreign, tmp_path):
    folder, _ = foreign
    pipeline = FAMILIES["sd15"].build()
    base = drawn(pipeline, "sd15")
    half = dict(list(load_file(folder / "ours" / WEIGHTS).items())[:-2])
    save_file({**half, **{f"unet.elsewhere.{i}.lora.{side}.weight": torch.ones(4, 4) for i in range(3) for side in ("down", "up")}}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"is not of this .*: \d+ of its \d+ tensors found a place"):
        load_lora(pipeline, tmp_path)
    assert torch.equal(drawn(pipeline, "sd15"), base)
    policy = Policy(FAMILIES["sd15"].build())
    policy.add_lora(rank=4, alpha=8)
    for name in ("ours", "kohya"):
        with pytest.raises(ValueError, match=r"another scale in the LoRA that is there: .*to_\S+ has 1 in the file, 2 here.*lora.unload\(pipeline\)"):
            policy.load_lora(folder / name)
    policy = Policy(FAMILIES["sd15"].build())
    policy.add_lora(rank=2, alpha=4)
    with pytest.raises(ValueError, match=r"does not fit the LoRA that is there: .* is \(4, \d+\) in it, \(2, \d+\) here.*lora.unload"):
        policy.load_lora(folder / "ours")


def test_where_no_lora_is_the_message_says_what_is(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"No LoRA 'nofile'.*no such folder or file"):
        lora_finder.find("nofile")
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"several files \(one.safetensors, two.safetensors\)"):
        lora_finder.find(tmp_path)
    with pytest.raises(FileNotFoundError, match="has: one.safetensors, two.safetensors"):
        lora_finder.find(tmp_path / "three.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="may hold code"):
        lora_finder.find(tmp_path / "pickle.bin")
    with pytest.raises(ValueError, match="unet has no LoRA to save"):
        Policy(FAMILIES["sd15"].build()).save_lora(tmp_path)


# --- adapters of others ------------------------------------------------------------------------------------------------


def test_the_configuration_travels_with_the_file(tmp_path):
    trained(FAMILIES["sd3"].build(), "sd3", tmp_path, alpha=3, use_rslora=True)
    found = lora_finder.configuration(tmp_path / WEIGHTS)
    assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (4, 3, True)
    assert found["target_modules"] == sorted(found["target_modules"])
    assert json.loads(lora_finder.metadata(tmp_path / WEIGHTS)[lora_finder.METADATA])
