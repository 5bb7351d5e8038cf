"""Dimensional collapse: spectra of features and weights, LiDAR."""
