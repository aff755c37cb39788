"""Training: losses, optimizer, learning-rate schedule, step, and the loop."""
