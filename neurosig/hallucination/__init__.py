"""Hallucination neurons: scores that say how far a majority answer can be trusted."""
