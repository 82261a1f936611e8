"""What a model knows of its language, measured."""
