"""Devices, threads and, later, meshes: the only room that names one."""
