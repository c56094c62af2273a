"""A model organism: a small model trained from scratch, of which the truth about patterns and made-up answers is known.

``load_model("organism")`` loads it, ``tasks`` holds what it was taught, ``python -m neurosig.organism.train`` makes it.
"""
