"""Every method, what it gains and what it pays, against controls: `python -m benchmarks.frontier`."""
