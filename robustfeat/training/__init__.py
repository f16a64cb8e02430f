"""Makes models and measures them: concepts, data, network, HRRL, trainer, export. Needs the extra `train`."""
