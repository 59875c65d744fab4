"""Looking inside: what a model does, as numbers and text; files are written by the command line."""
