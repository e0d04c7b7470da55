"""Kills, signals, full disks, rivals."""
