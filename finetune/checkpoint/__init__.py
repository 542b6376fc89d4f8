"""What a run is saved as: published whole, verified, identified, pruned."""
