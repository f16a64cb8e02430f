"""What HTTP and TorchServe share: batches across requests, and the forms of answers."""
