"""How good a model's features are: probes on tasks, robustness, fine-tuning. Needs the extra `train`."""
