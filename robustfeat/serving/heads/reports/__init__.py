"""How well a head answers labelled rows: numbers, tables, pictures and a page."""
