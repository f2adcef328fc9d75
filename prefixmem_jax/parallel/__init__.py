"""Processes, devices and the mesh over them."""
