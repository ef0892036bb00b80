"""What a training step and a run cost: estimated from shapes, measured on this machine, and what to change."""
