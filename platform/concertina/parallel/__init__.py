"""Process groups from a layout, collectives with start and finish, the dispatcher, the ZeRO-1 buckets."""
