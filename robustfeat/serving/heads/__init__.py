"""From features to answers: heads, the labels that they learn from, and how they are fitted."""
