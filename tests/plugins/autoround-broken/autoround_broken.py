"""Breaks on import, the way a plugin does after an upgrade of something that it needs."""

raise ImportError("cannot import name `gone` from `somewhere`")
