"""How wide an average of weights may be: in a file of its own, for the options of commands load nothing of pydantic."""

NARROWEST, WIDEST = 0.01, 0.28
"""Bounds of sigma_rel (see `core.ema.PowerEMA`)."""
