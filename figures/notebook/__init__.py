"""What the notebooks show: their pictures and the runs they look at."""
