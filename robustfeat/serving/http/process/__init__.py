"""A server's processes: supervisor, workers, connections, metrics, logs."""
