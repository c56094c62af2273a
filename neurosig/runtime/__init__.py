"""What every command shares: options, errors, output folders, files, run records."""
