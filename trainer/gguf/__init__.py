"""From adapter and base weights to a GGUF: names, types a tensor, exact merge, streamed writing, Modelfile. Numpy only."""
