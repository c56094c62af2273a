"""Screening: what one forward pass over a prompt says about how far a model's answers will agree."""
