"""How long does a run stand still when a process or a machine goes, ours and others'?"""
