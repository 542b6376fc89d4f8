"""One terminal view per command."""
