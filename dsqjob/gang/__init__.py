"""Gangs: one supervisor a node, and the ranks that it starts. Knows no model, no job file, no stage."""
