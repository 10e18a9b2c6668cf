"""Shared work: independent jobs on processes or Ray, and the ranks of one run."""
