"""Score a model on benchmarks."""
