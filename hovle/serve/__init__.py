"""Answer requests of OpenAI's chat API with a model."""
