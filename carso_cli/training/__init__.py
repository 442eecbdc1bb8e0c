"""Trains the purifier and the classifier."""
