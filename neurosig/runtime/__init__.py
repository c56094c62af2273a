"""The frame of every command: options, errors, output folders, files, run records."""
