"""Bundled question sets and the generator that writes them."""
