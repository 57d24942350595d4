"""One HTML page, and pictures, of what a cache held while a stream was read."""
