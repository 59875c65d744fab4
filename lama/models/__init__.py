"""The models: each a stack of the same blocks."""
