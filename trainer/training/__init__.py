"""Training and measuring one model. Everything here runs in the worker; torch is at home, the libraries stay behind walls."""
