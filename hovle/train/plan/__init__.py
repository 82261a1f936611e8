"""Predict memory, speed, hours and cost of training stages before they run."""
