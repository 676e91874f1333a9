"""Features of class names and words, 64 numbers each: tables, and the tools that make them."""
