"""A run: its folder, its loop, its checkpoints, and the stage that puts them together."""
