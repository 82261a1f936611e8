"""Evaluation: answers in free generation, scored."""
