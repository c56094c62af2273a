"""``python -m neurosig.intervene``: scale located neurons and measure the answers."""
