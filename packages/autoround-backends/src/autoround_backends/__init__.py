"""Inference backends of AutoRound. They are found through the entry point `backends`; nothing needs importing."""
