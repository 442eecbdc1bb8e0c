"""Attacks, one per file, sharing one threat model."""
