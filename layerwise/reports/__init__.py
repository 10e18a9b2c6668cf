"""Output for people: tables, progress, pages and plots."""
