"""Reports a head's accuracy on labelled rows: numbers, tables, pictures and a page."""
