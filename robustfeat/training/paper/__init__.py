"""The paper's experiments: what they train, measure and print. Needs the extra `train`."""
