"""The minimum of a linear classifier's objective."""
