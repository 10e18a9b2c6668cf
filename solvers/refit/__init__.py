"""Parts of the exact refit: row systems, factorizations, conjugate gradients, rounds."""
