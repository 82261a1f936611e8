"""One optimizer step: gradients, schedule, validation."""
