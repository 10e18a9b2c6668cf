"""What a run will need, from shapes and headers: memory, disk, operations, time."""
