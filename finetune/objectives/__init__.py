"""Micro-batch to summed loss, and its weight."""
