"""`neurosig.Probe`: what it reads, how it is fitted, calibrated, saved and tested by scaling its neurons."""
