"""Model folders from runs, and from other libraries' networks."""
