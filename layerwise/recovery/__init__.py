"""Recovery: retrain a few parameters of a pruned model with its masks fixed."""
