"""What the quick start needs: a tiny model, its text and its chats."""
