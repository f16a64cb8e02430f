"""Code shared by HTTP and TorchServe: batches across requests, and the formats of replies."""
