"""Config facts, tokenizer, weights and adapters; model folders in and out."""
