"""Two parts of :mod:`experiments.noise_rules`: the control, and steps with a fixed cost."""
