"""Runs models: options, engines and their GPU libraries."""
