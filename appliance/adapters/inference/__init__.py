"""Running models in child processes."""
