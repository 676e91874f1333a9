"""Tables that give class names and words as 64 numbers each."""
