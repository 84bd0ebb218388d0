"""One file a command; `jobs/recipes` holds what they run."""
