"""One thread per process: small models lose more to threads that wait for each other than they gain."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)
