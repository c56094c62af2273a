"""Causal language models: loading, fingerprints, the shared pass over prompts."""
