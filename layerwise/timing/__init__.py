"""Seconds of solvers and of the stages of a run, next to the floors of the machine."""
