"""Calibration text becomes token ids."""
