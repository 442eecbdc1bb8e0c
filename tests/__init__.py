"""The tests, as a package of this checkout: helpers are imported from it by name."""
