"""One script per figure, each from a results folder or its committed data."""
