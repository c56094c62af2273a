"""Rollouts: sampled here, sampled by a server, or read from a file."""
