"""Parts of Adapprox: directions, factored second moments, subspaces, memory."""
