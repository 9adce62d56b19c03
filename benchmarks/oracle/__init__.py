"""The shipped algorithms on a denoising chain that is known exactly: `python -m benchmarks.oracle`."""
