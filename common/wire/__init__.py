"""Generated code of ``proto/cloister/v1``; ``shared``, ``accountant`` and ``trainer`` alone read and write messages."""
