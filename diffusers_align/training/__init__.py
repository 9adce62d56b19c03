"""What the training scripts share: arguments, the run (checkpoints, trackers, metrics), sampling, pictures, the Hub."""
