"""Plain documents to the terminal, files and HTML, secrets masked."""
