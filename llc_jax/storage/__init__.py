"""What a run leaves on disk: written whole or not at all, read back as it was."""
