"""Generate the English-German sentence pairs of the quickstart."""
