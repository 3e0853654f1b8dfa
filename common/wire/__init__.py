"""The messages of ``proto/cloister/v1`` as generated code, and ``translate``, which alone reads and writes them."""
