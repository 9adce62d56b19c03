"""The study of half precision: its products are those of the precision, its table compares equal pictures."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.half_precision import METHODS, Products, table
from diffusers_align.files.paths import find_recipe

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


def test_recipes_are_there():
    assert all(find_recipe(method.recipe).is_file() for method in METHODS.values())
