"""One translator a checkpoint family."""
