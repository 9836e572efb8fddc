"""The same policy for one study at a time, in NumPy.

A study's ask works with arrays of ten by three hundred, on which a torch operation costs some
ten times what it computes. Training needs the batched torch form
(:mod:`~optuna_lora_rl.policy.proposal`), so both exist; each function here names its batched
twin, and ``tests/policy/test_single.py`` holds them together. Random numbers stay torch's: both
forms draw the same ones.

Notations
    n, m      finished and running trials, N points, D columns, R roles
    x         points in the unit cube, shape (N, D)
"""
