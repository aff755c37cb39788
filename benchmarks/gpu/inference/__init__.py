"""The sections of `make gpu-check-inference`; every file here holds one."""
