"""The choice of settings, and heads fitted with them."""
