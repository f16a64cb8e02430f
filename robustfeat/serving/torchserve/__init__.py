"""Serves model folders with TorchServe: archives, their handler, and a way to run it."""
