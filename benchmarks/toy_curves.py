"""Learning curves of online RL on the toy of tests/whole/test_contract.py, whose objective is known in closed form: three seeds each.

    python benchmarks/toy_curves.py --output docs/toy_curves.png

All make 200 updates with the same learning rate on rollouts of 192 samples (TRPO: 50 natural-gradient steps; NFT and AWM train the
toy's ODE, whose optimum is another, with a smaller rate): a check that each climbs, not a ranking.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / folder) for folder in ("support", "whole")]
import test_contract as toy  # noqa: E402

SEEDS, UPDATES = (0, 1, 2), 200


def curves() -> dict[str, tuple[int, list[list[float]]]]:
    """Updates a rollout and, of each seed, what the exact objective lacks to its optimum after each rollout; by algorithm."""
    found = {}
    for algorithm in toy.ALGORITHMS:
        gaps = [[toy.OPTIMUM - value for value in toy.train(algorithm(), seed, UPDATES)[1]] for seed in SEEDS]
        found[algorithm.__name__] = (algorithm.updates_a_rollout, gaps)
    found["TRPO"] = (1, [trust_region(seed) for seed in SEEDS])
    for name, loss in (("DiffusionNFT", toy.nft), ("AWM", toy.awm)):
        found[name] = (2, [toy.train_on_noised_samples(loss, seed, UPDATES // 2) for seed in SEEDS])
    return found


def trust_region(seed: int) -> list[float]:
    chain, generator = toy.Chain(), torch.Generator().manual_seed(seed)
    gap = [toy.OPTIMUM - chain.objective().item()]
    for _ in range(UPDATES // 4):
        toy.trust_region(chain, chain.rollout(192, generator), max_kl=0.05)
        gap.append(toy.OPTIMUM - chain.objective().item())
    return gap


def rollouts_until(gap: list[float], share: float) -> int | None:
    """The first rollout after which that share of the gap is closed."""
    return next((i for i, value in enumerate(gap) if value <= (1 - share) * gap[0]), None)


def draw(found: dict[str, tuple[int, list[list[float]]]], path: Path) -> None:
    figure = Figure(figsize=(9, 2.2 * -(-len(found) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(found) // 4), 4, sharex=True, sharey=True).flatten()
    for axis, (name, (_, gaps)) in zip(axes, found.items()):
        for gap in gaps:
            axis.semilogy(gap, linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[len(found) :]:
        axis.axis("off")
    figure.supxlabel("rollouts of 192 samples")
    figure.supylabel("optimum - objective")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/toy_curves.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = curves()
    draw(found, args.output)
    print("| algorithm | updates per rollout | rollouts until 90% of the gap is closed (3 seeds) | gap left at the end, median |")
    print("|---|---|---|---|")
    for name, (updates, gaps) in found.items():
        needed = ", ".join(str(rollouts_until(gap, 0.9) or "-") for gap in gaps)
        print(f"| {name} | {updates} | {needed} | {statistics.median(gap[-1] / gap[0] for gap in gaps):.1%} |")


if __name__ == "__main__":
    main()
