"""Experiments: one file per result, each with a function from a config string to a whole config."""
