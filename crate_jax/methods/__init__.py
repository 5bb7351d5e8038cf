"""What is optimised, one file per method: pure functions; no file, no mesh, no mutable state."""
