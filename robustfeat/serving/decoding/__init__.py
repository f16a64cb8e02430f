"""Decoding in processes of its own."""
