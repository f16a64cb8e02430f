"""Labels: read from files or class folders, and matched with rows by path."""
