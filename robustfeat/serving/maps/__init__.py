"""Draws a collection as a map: a two-dimensional layout, colours and thumbnails on one page."""
