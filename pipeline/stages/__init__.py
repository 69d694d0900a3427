"""A run on disk, and the processes that make it."""
