"""Looking inside: what a model does, as text."""
