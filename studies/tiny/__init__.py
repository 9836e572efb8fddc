"""How the built-in models were pretrained and the built-in tasks measured.

Run from a clone: ``python -m studies.tiny.pretraining``, ``python -m studies.tiny.table``.
"""
