"""What the arguments of a command name, and where its bytes come from."""
