"""The shipped algorithms against the exact optimum of a small denoising chain: three tables, in minutes on one thread.

python -m benchmarks.oracle            # all of it
python -m benchmarks.oracle --share 0.1 --seeds 2   # a quick look: fewer updates and draws
"""

from __future__ import annotations

import argparse
import time

import torch

from . import estimators, foundations, table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the updates and draws")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.process_time()
    print("Total variation to p*, mean ± standard error over seeds\n")
    print(table.as_markdown(table.rows(range(args.seeds), args.share)))
    print("\nBias and variance of gradient estimators, exactly, as shares of the gradient's length and its square\n")
    print("| advantages | bias | by theory | variance | by theory |\n|---|---|---|---|---|")
    for row in estimators.table(estimators.all_paths()):
        known = "" if row["variance_said"] != row["variance_said"] else f"{row['variance_said']:.3f}"
        print(f"| {row['name']} | {row['bias']:.4f} | {row['bias_said']:.4f} | {row['variance']:.3f} | {known} |")
    print("\nThe classical methods: errors of the first state's value\n\n| method | error | |\n|---|---|---|")
    for name, gap in foundations.dynamic_programming().items():
        print(f"| {name} | {gap:.1e} | |")
    for name, (error, spread) in (foundations.prediction() | foundations.control()).items():
        print(f"| {name} | {error:+.4f} | ± {spread:.4f} |")
    for name, (error, spread) in foundations.off_policy().items():
        print(f"| {name} importance sampling | {error:+.4f} | root mean square {spread:.4f} |")
    print(f"\n{time.process_time() - start:.0f} s of one thread")


if __name__ == "__main__":
    main()
