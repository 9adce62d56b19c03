"""The study of half precision: its products are those of the precision, its table compares equal pictures."""

import json

import pytest
import torch
import yaml
from flag_tools import load_script
from torch.nn import functional as F

from benchmarks.frontier.tasks import TASKS, flags_of
from benchmarks.half_precision import METHODS, Products, Study, table
from diffusers_align.files.levels import digest_of, script_of

torch.set_num_threads(1)


def gradients(precision: torch.dtype) -> list[torch.Tensor]:
    """Of a product, a linear layer, a convolution and an attention."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (2, 8, 12), "b": (2, 12, 6), "picture": (1, 4, 6, 6), "kernel": (3, 4, 3, 3), "query": (1, 2, 9, 8), "bias": (5,), "matrix": (5, 6)}
    x = {name: torch.randn(size, generator=generator).to(precision).requires_grad_() for name, size in sizes.items()}
    products = F.linear(x["a"] @ x["b"], x["matrix"], x["bias"]), F.conv2d(x["picture"], x["kernel"], padding=1)
    attended = F.scaled_dot_product_attention(x["query"], x["query"] / 2, x["query"])
    assert {out.dtype for out in (*products, attended)} == {precision}
    sum(out.float().square().sum() for out in (*products, attended)).backward()
    return [value.grad for value in x.values()]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_precision_up_to_its_rounding(precision):
    own = gradients(precision)
    with Products():
        found = gradients(precision)
    exact = gradients(torch.float32)
    for one, other, whole in zip(own, found, exact):
        assert one.dtype == other.dtype == precision
        error = float((one.double() - whole.double()).abs().max())
        assert float((other.double() - one.double()).abs().max()) <= 2 * error + 1e-9, "no farther from torch's own than that is from float32"
        assert not torch.equal(other.float(), whole), "rounded"


def test_float32_and_float64_are_left_alone():
    x = torch.randn(5, 5, dtype=torch.float64)
    with Products():
        assert torch.equal(x @ x, torch.mm(x, x)) and (x.float() @ x.float()).dtype == torch.float32


def row(precision, seed, reward, method="Flow-GRPO", error=0.0):
    pictures = torch.tensor(reward)
    scores = {"reward": pictures.tolist(), "judge": [0.5, 0.5], "base_reward": [0.0, 0.0], "base_judge": [0.5, 0.5]}
    return {"method": method, "precision": precision, "seed": seed, "rows": 5856, "ratio_error": error, **scores}


def test_the_table_compares_equal_seeds_by_the_larger_of_both_errors():
    rows = [row("no", 0, [1.0, 3.0]), row("no", 1, [2.0, 4.0]), row("bf16", 0, [1.5, 3.5]), row("bf16", 1, [2.1, 4.1], error=0.01), row("bf16", 2, [9.0, 9.0])]
    *_, whole, half = table(rows)
    assert whole == "| Flow-GRPO | float32 | 5,856 | +2.5000 ± 0.6455 |  |  | 0 |"
    # Differences 0.5 and 0.1 of the two seeds: 0.3 ± 0.2 over seeds, ± 0.115 over pictures. The third seed has no float32 to be compared with.
    assert half == "| Flow-GRPO | bf16 | 5,856 | +2.8000 ± 0.6028 | +0.3000 ± 0.2000 | +0.0000 ± 0.0000 | 0.01 |"


@pytest.mark.parametrize("name", list(METHODS))
def test_scripts_take_the_settings_and_nothing_ends_a_run_early(name, tmp_path):
    method = METHODS[name]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**method.settings, "output_dir": "out"}))
    args = load_script(script_of(method.recipe)).parse_args(["--config", str(tmp_path / "settings.yaml")])
    assert args.reward == flags_of(TASKS[method.task].reward)["reward"] and args.num_epochs == method.epochs
    assert args.early_stop_hacking is None and args.early_stop_metric is None


def test_trainings_with_other_settings_are_kept_and_not_compared(tmp_path):
    own = [{**row("no", seed, [1.0, 2.0]), "settings": digest_of(METHODS["Flow-GRPO"].settings)[:8]} for seed in (0, 1)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (own[0], {**own[1], "settings": "others"})))
    study = Study(tmp_path)
    assert len(study.rows) == 2 and [line["seed"] for line in study.comparable] == [0]
