"""The folder of a run: lock, checkpoints, checksums, metrics, pictures. Only this room writes to it."""
