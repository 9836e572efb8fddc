"""A study from file to report."""
