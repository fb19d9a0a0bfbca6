"""What does supervision cost a step, and does it give up a member that lives?"""
