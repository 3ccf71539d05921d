"""Runnable examples. Start with ``python -m examples.kl_vs_mse sweep limits --quick``."""
