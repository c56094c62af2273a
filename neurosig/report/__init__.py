"""``python -m neurosig.report``: how well the signals of an export predict right answers."""
