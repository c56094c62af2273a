"""``python -m neurosig.verify``: check a folder of results against its own records."""
