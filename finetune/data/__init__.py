"""Files to messages to token rows to tensors."""
