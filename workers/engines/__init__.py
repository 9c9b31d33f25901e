"""What computes: one contract (`base.py`), one contract test suite, several engines. torch is imported only in here."""
