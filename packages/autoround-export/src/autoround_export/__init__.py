"""Checkpoint formats of AutoRound. They are found through the entry point `export`; nothing needs importing."""
