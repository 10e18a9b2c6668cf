"""Independent jobs on many workers: one scheduler, local processes or Ray below it."""
