"""Searches a collection's features for nearest rows and duplicates."""
