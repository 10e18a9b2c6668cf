"""Code that several test files share: problems, models, folders, runs, references."""
