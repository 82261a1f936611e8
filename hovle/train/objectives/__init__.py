"""What the stages minimise, and the teachers of distillation."""
