"""Devices and processes: mesh, sharding rules, several processes, signals. Knows no images."""
