"""Parts of the column solvers: scores, supports, curves, the search and the refit."""
