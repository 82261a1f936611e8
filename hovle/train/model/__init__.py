"""The model as training holds it: where it starts, what of it learns, adapters, quantised parts, compiled layers."""
