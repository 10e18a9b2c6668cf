"""Block by block: what to prune, how, and the path of a model through a run."""
