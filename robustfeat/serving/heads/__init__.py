"""Heads, which classify features: their labels, fitting, predictions and reports."""
