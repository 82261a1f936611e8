"""A miniature learns to see on this machine, and its answers are drawn."""
