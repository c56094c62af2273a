"""``python -m neurosig.verify``: check a folder of results against its own records."""

SKIPPED = "skipped: "
"""How the problem of a check starts that could not be made."""
