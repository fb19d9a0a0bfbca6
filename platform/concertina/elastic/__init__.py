"""Who decides what when machines come and go, and where did the time go? Pure functions on frozen values, and books."""
