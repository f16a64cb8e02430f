"""How a model is run: options, engines and the GPU libraries that they use."""
