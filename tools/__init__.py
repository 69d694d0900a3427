"""Programs for those who develop Relay."""
