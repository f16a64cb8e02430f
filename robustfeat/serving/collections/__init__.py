"""What is done with the features of a collection: its nearest rows to a query, its duplicates, its map."""
