"""Devices, processors, memory and CUDA graphs: the only package that names CUDA."""
