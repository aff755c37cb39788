"""Devices, memory and CUDA graphs of a process: the only package that names CUDA."""
