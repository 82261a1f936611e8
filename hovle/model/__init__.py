"""The model: what travels with a checkpoint. One flat folder whose files import each other by `from .name` only."""
