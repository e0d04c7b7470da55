"""Verification: independent formulas, the checkpoint's own papers, and what servers demand."""
