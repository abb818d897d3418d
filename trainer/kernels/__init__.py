"""Arithmetic in torch (and triton) alone, each piece with its derivation beside it."""
