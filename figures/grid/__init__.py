"""``python -m figures.grid``: every method on every source domain, and the paper's tables."""
