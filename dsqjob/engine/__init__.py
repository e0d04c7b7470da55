"""Resumable work: fingerprints, claims, atomic publishing, records, events. Knows no model."""
