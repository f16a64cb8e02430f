"""Reads labels from files or class folders, and matches them with rows by path."""
