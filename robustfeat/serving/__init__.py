"""From a model folder to features: engine, extractor, bulk embedding. Never imports torch."""
