"""YAML to a typed Recipe, every problem with its line."""
