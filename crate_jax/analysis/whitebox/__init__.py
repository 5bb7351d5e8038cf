"""What each layer of a white-box encoder does: compression, sparsity, Theorem 3, pictures."""
