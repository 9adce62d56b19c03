"""Runs recipes again and compares what they log with the committed curves: `python -m benchmarks.verify`, or `make verify`."""
