"""Serves features and predictions over HTTP."""
