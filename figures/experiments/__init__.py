"""Experiments behind figures: measure first, then draw."""
