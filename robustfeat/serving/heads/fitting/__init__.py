"""Chooses settings and fits heads."""
