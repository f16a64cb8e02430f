"""A collection as a map: a layout in two dimensions, colours, thumbnails, and one page that shows them."""
