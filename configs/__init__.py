"""Experiments: one file per result, each a function of a config string to a full config."""
