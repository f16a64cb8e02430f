"""What a model is and where it lives: config, preprocessing, model folder, card, the built-in model."""
