"""Seconds of a run's stages and of solvers, next to the least that a machine could take."""
