"""The organisation's own page, on its own machine: what its data sets have spent, released and refused.

It is read from the organisation's ledger, opened for reading alone, and from the trainer's local socket; nothing of it
leaves. ``book`` folds the ledger, ``view`` puts it beside what the trainer says, ``app`` serves it on loopback.
"""
