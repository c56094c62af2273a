"""Reasoning-pattern neurons: which questions rely on the same neurons."""
