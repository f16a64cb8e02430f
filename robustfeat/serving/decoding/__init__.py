"""Decodes images in separate processes."""
