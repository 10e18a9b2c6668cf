"""Memory, disk space, operations and time of a run, planned from shapes and headers."""
