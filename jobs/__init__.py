"""The command line, the job files, and the entry point that a submitted job runs."""
