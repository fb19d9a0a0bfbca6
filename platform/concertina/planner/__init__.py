"""What would a layout cost, before anything starts?"""
