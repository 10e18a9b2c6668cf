"""Files of a checkpoint: shards, masks and JSON, validated and written atomically."""
