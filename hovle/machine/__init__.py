"""What this machine can do: speed, memory, facts, and what is missing on it."""
