"""The `autoround` command."""
