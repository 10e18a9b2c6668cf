"""Text and tokens: calibration windows and perplexity."""
