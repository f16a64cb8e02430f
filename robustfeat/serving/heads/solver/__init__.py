"""Minimises the objective of linear classifiers."""
