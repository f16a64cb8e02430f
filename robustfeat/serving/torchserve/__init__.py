"""Model folders for TorchServe: its archives, the handler in them, and a way to run it."""
