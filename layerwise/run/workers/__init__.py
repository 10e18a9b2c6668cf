"""Work that is shared: independent jobs on processes or Ray, and ranks of one run."""
