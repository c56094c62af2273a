"""Change neurons inside a with block."""
