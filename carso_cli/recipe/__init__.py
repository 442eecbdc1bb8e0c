"""What a run is: typed recipes, read from YAML. Nothing here loads torch."""
