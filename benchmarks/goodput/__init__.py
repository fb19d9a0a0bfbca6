"""How much of what a spot market offers does a run use? A recorded trace, replayed in a hurry."""
