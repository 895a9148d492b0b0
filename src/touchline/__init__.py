"""Touchline: photos in, a registered, explained image classifier out."""

__version__ = "0.1.0"
