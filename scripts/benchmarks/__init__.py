"""Campaigns that measure: each writes its page and its JSON into docs/benchmarks/."""
