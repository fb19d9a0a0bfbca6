"""What would a layout cost? Pure functions of the model, the layout, the batch."""
