"""The frozen classifiers: architectures, records, weights."""
