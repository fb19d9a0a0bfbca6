"""One rank's engine: build, step, optimizer, loop."""
