"""Features and heads' answers over HTTP."""
