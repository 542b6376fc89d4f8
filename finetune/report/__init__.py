"""What a run leaves for people and programs: metrics.jsonl, run.json, the console."""
