"""Walls: each awkward library is imported by one module here and nowhere else, inside its functions."""
