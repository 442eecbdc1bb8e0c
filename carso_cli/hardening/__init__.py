"""`carso harden`: a purifier for a classifier that nobody may retrain."""
