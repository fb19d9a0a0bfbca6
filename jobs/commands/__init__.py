"""One module a command: `concertina validate` is in validate.py, and so on."""
