"""The sections of `make gpu-check-inference`, one in each file."""
