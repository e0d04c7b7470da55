"""Calibrated maxima: the ledger, how it settles into scales, and the reference's files."""
