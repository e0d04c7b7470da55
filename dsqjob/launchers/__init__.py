"""Ways to start workers somewhere. They know commands and exit codes, not what the work is."""

from __future__ import annotations

LAUNCHERS = {"local": "dsqjob.launchers.local"}
"""Kind in the job file -> module with ``run_workers``."""
