"""Who decides what when machines come and go: states, messages, placement, blame. Pure functions on frozen values."""
