"""Embeds inputs in bulk to files of features."""
