"""Measures clean and robust accuracy: setup, attacks, scoring, sanity checks, result."""
