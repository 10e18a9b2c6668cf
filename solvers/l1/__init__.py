"""Parts of the l1 solvers: the quadratic, FISTA and splitting steps, and their state."""
