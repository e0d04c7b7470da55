"""What is particular to a family of models: names, splits, targets, config files."""

from __future__ import annotations

from importlib import import_module

from dsqjob.families.face import Family

FAMILIES = {"deepseek-v4": "dsqjob.families.deepseek_v4"}
"""Name in the job file -> module that holds ``FAMILY``."""


def family(name: str) -> Family:
    """The family of that name; KeyError if there is none."""
    found: Family = import_module(FAMILIES[name]).FAMILY
    return found
