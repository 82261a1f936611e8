"""One file for each skill; `registry.py` names them."""
