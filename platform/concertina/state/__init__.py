"""Durable checkpoints, described by boxes. (Snapshots in peers' memory and reshard plans come here too.)"""
