"""The messages of ``proto/cloister/v1`` as generated code; ``shared``, ``accountant`` and ``trainer`` read and write them."""
