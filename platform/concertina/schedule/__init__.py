"""What runs when: plans of a step, as data."""
