"""Records, their formats, cleaning, splitting, Gemma's template and packing. Pure: no torch, no network, no `datasets`."""
