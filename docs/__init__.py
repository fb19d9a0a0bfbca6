"""Pages for people, and `generate.py`, which writes the tables in them."""
