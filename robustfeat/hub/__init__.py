"""Models as folders: config, preprocessing, layout, card, the built-in model, and the Hub."""
