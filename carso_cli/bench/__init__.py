"""`carso bench`: times the work of a recipe beside a naive baseline."""
