"""One module a verb, each a page read from top to bottom."""
