"""The classifiers that CARSO defends: architecture, known models, strict loading of weights."""
