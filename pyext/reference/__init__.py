"""The specification of every op in plain PyTorch. No backend is imported here."""
