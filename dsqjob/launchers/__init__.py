"""Ways to start workers somewhere. They know commands and exit codes, not what the work is."""

from __future__ import annotations

LAUNCHERS = {"local": "dsqjob.launchers.local", "slurm": "dsqjob.launchers.slurm.submit"}
"""Kind in the job file -> module that starts workers: ``local`` runs them, the others submit them."""
