"""``python -m neurosig.report``: what the signals of an export are worth."""
