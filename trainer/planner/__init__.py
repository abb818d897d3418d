"""Arithmetic about a run before it starts: bytes and seconds from the config and the model's size alone. No torch."""
