"""Trust-region steps: the parts against dense linear algebra, the step against the natural gradient."""

import pytest
import torch
from oracles import exact_fisher_product
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from diffusers_align import Policy, embedded, sde_twin
from diffusers_align.rl import conjugate_gradient, finite_difference_fisher_product, trust_region_step
from diffusers_align.rl.trust_region import displaced

PRODUCTS = [exact_fisher_product, finite_difference_fisher_product]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spd(n, seed=0):
    a = randn(n, n, seed=seed)
    return a @ a.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


# conjugate gradients


def test_conjugate_gradient_solves():
    a, b = spd(12), randn(12, seed=1)
    solution = conjugate_gradient(lambda v: a @ v, b, iterations=40, tolerance=1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    assert solution.iterations < 40 and solution.residual.norm() <= 1e-12 * b.norm()


def test_conjugate_gradient_stops_where_it_is_told_to():
    a, b, products = spd(12), randn(12, seed=1), []

    def matvec(v):
        products.append(v)
        return a @ v

    residuals = []
    for iterations in (1, 4, 8):
        products.clear()
        solution = conjugate_gradient(matvec, b, iterations=iterations, tolerance=0)
        assert len(products) == solution.iterations == iterations
        torch.testing.assert_close(solution.residual, b - a @ solution.x, rtol=1e-9, atol=1e-9)
        residuals.append(solution.residual.norm().item())
    assert residuals[0] > residuals[1] > residuals[2]
    assert conjugate_gradient(matvec, b, tolerance=0.5).iterations < 8
    assert conjugate_gradient(matvec, torch.zeros_like(b)).x.abs().max() == 0


def test_conjugate_gradient_goes_nowhere_along_negative_curvature():
    assert conjugate_gradient(lambda v: -v, randn(3)).x.abs().max() == 0


# products with the Fisher matrix


class Steps(nn.Module):
    """Means of three steps of two micro-batches, all from one small network."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, 3, dtype=dtype), nn.Tanh())
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        with torch.no_grad():
            for i, parameter in enumerate(self.layers.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=i))
        self.inputs = [randn(6, 4, seed=10 + i, dtype=dtype) for i in range(6)]
        self.stds = [torch.full((1, 1), 0.1 + 0.2 * i, dtype=dtype) for i in range(6)]

    def forward(self):
        return torch.cat([(self.layers(x) / std).flatten() for x, std in zip(self.inputs, self.stds)])

    def sweep(self, on_step):
        for x, std in zip(self.inputs, self.stds):
            on_step(self.layers(x), std)

    def dense_fisher(self):
        weights = dict(self.named_parameters())
        jacobians = jacrev(lambda p: functional_call(self, p, ()))(weights)
        jacobian = torch.cat([jacobians[name].flatten(1) for name in weights], 1)
        return jacobian.T @ jacobian


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_the_dense_jacobians(product):
    model = Steps()
    parameters, fisher = list(model.parameters()), model.dense_fisher().detach()
    before = [p.detach().clone() for p in parameters]
    for seed, scale in ((1, 1.0), (2, 1e-4), (3, 1e4)):
        v = scale * randn(fisher.shape[0], seed=seed)
        torch.testing.assert_close(product(model.sweep, parameters, v), fisher @ v, rtol=1e-6, atol=1e-6 * (fisher @ v).abs().max().item())
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(parameters, before))
    assert product(model.sweep, parameters, torch.zeros_like(v)).abs().max() == 0


def test_finite_differences_hold_in_float32():
    model, exact = Steps(torch.float32), Steps()
    v = randn(len(exact.dense_fisher()))
    found = finite_difference_fisher_product(model.sweep, list(model.parameters()), v.float()).double()
    expected = (exact.dense_fisher() @ v).detach()
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_parameters_come_back_when_a_sweep_fails():
    model = Steps()
    before = parameters_to_vector(model.parameters()).detach().clone()
    with pytest.raises(RuntimeError), displaced(list(model.parameters()), torch.ones_like(before)):
        assert (parameters_to_vector(model.parameters()) != before).all()
        raise RuntimeError
    assert torch.equal(parameters_to_vector(model.parameters()), before)


@pytest.fixture(scope="module")
def policy():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd"))
    policy = Policy(pipeline, sde_twin(pipeline.scheduler, eta=1.0), num_inference_steps=3, guidance_scale=1.0)
    torch.manual_seed(0)
    policy.add_lora(2, 2)
    return policy


def test_products_agree_on_a_pipeline(policy):
    trajectory, parameters = policy.rollout(["a red cat", "a dog"], seeds=[1, 2]), policy.trainable_parameters()

    def sweep(on_step):
        policy.replay(trajectory, lambda k, transition: on_step(transition.mean, transition.std))

    v = randn(sum(p.numel() for p in parameters), dtype=torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        exact = exact_fisher_product(sweep, parameters, v)
    assert exact.norm() > 0
    for rounding, error in ((None, 1e-3), (2**-10, 0.04)):  # as it is in float32, and as it would be in TF32: 0.4 to 2.6 % on nine trajectories
        found = finite_difference_fisher_product(sweep, parameters, v, rounding=rounding)
        assert (found - exact).norm() < error * exact.norm()


# the step


class Quadratic:
    """A linear surrogate and a quadratic KL about where the parameters are: the natural gradient is exact."""

    def __init__(self, n=8):
        self.parameters = [nn.Parameter(randn(n - 3, seed=5)), nn.Parameter(randn(3, 1, seed=6))]
        self.start, self.fisher, self.slope = self.flat(), spd(n), randn(n, seed=1)
        self.evaluations = 0

    def flat(self):
        return parameters_to_vector(self.parameters).detach().clone()

    def evaluate(self):
        self.evaluations += 1
        moved = self.flat() - self.start
        return float(self.slope @ moved), float(moved @ self.fisher @ moved) / 2

    def step(self, **options):
        arguments = {"max_kl": 0.01, "cg_iterations": 40, "cg_tolerance": 1e-12, "damping": 0.0, **options}
        return trust_region_step(self.parameters, lambda: (0.0, self.slope), lambda v: self.fisher @ v, self.evaluate, **arguments)


def test_on_a_quadratic_the_step_is_the_natural_gradient():
    problem = Quadratic()
    report = problem.step()
    natural = torch.linalg.solve(problem.fisher, problem.slope)
    expected = -(2 * 0.01 / (problem.slope @ natural)).sqrt() * natural
    torch.testing.assert_close(problem.flat() - problem.start, expected, rtol=1e-8, atol=1e-8)
    assert report["accepted"] == 1 and report["backtracks"] == 0 and problem.evaluations == 1
    assert report["kl"] == pytest.approx(0.01)
    assert report["improvement"] == pytest.approx(-float(problem.slope @ expected)) == pytest.approx(report["expected_improvement"])
    assert report["cg_residual"] < 1e-10 and report["step_norm"] == pytest.approx(expected.norm().item())
    assert report["grad_norm"] == pytest.approx(problem.slope.norm().item())


def test_damping_adds_to_the_diagonal():
    problem = Quadratic()
    report = problem.step(damping=0.7)
    damped = problem.fisher + 0.7 * torch.eye(8, dtype=torch.float64)
    natural = torch.linalg.solve(damped, problem.slope)
    torch.testing.assert_close(problem.flat() - problem.start, -(0.02 / (problem.slope @ natural)).sqrt() * natural, rtol=1e-8, atol=1e-8)
    assert report["kl"] < 0.01 and report["accepted"] == 1


def test_few_iterations_still_fill_the_region():
    report = Quadratic().step(cg_iterations=2)
    assert report["cg_residual"] > 1e-3 and report["kl"] == pytest.approx(0.01) and report["accepted"] == 1


@pytest.mark.parametrize("worse", ["kl", "surrogate", "nan"])
def test_a_step_that_never_helps_is_taken_back_bit_for_bit(worse):
    problem = Quadratic()
    exact = problem.evaluate

    def evaluate():
        surrogate, kl = exact()
        return {"kl": (surrogate, 1.0), "surrogate": (-0.01 * surrogate, kl), "nan": (float("nan"), kl)}[worse]

    problem.evaluate, start = evaluate, [p.detach().clone() for p in problem.parameters]
    report = problem.step(backtracks=4)
    assert report["accepted"] == 0 and report["backtracks"] == 4 and problem.evaluations == 5
    assert all(torch.equal(p, s) for p, s in zip(problem.parameters, start))


def test_the_step_is_shortened_until_the_exact_kl_fits():
    problem = Quadratic()
    exact = problem.evaluate
    problem.evaluate = lambda: (exact()[0], 3 * exact()[1])
    full = Quadratic().step()["step_norm"]
    report = problem.step(backtrack_factor=0.5)
    assert report["backtracks"] == 1 and report["kl"] == pytest.approx(3 * 0.01 / 4)
    assert report["step_norm"] == pytest.approx(full / 2) == pytest.approx((problem.flat() - problem.start).norm().item())
    # an improvement too small for what the gradient promises is not worth the way
    assert Quadratic().step(accept_ratio=1.1)["accepted"] == 0


def test_without_a_gradient_nothing_moves():
    problem = Quadratic()
    problem.slope = torch.zeros(8, dtype=torch.float64)
    report = problem.step()
    assert report["accepted"] == report["kl"] == 0 and problem.evaluations == 0 and torch.equal(problem.flat(), problem.start)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_step_on_a_network_improves_within_its_region(product):
    model = Steps()
    parameters, old = list(model.parameters()), model().detach()
    weights = randn(len(old), seed=3)

    def surrogate():
        return -(weights * (model() - old)).exp().mean()

    def value_and_gradient():
        value = surrogate()
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        return value.item(), torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grads, parameters)])

    @torch.no_grad()
    def evaluate():
        return float(surrogate()), float((model() - old).square().sum()) / 2

    report = trust_region_step(parameters, value_and_gradient, lambda v: product(model.sweep, parameters, v), evaluate, max_kl=0.1, damping=1e-3)
    value, kl = evaluate()
    assert report["accepted"] == 1 and 0.03 < kl <= 0.1 * (1 + 1e-6) and kl == report["kl"]
    assert report["surrogate"] - value == report["improvement"] > 0.1 * report["expected_improvement"] > 0
