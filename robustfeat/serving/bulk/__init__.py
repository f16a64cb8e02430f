"""Bulk embedding: inputs to a file of features."""
