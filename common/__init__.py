"""What coordinator and organisations share: the privacy mathematics, the ledger, the statements and their errors."""
