"""The groups of ``cloister``: what each command takes, and which room does it."""
