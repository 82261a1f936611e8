"""Look inside a model: attention, embeddings, what it kept of its language."""
