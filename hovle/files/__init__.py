"""Files and folders: written whole or not at all, hashed, checked before a long load."""
