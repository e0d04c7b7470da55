"""Commands for people and launchers."""
