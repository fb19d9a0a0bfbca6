"""The web application that shows runs from their event files. It comes with a later issue; its floor is laid."""
