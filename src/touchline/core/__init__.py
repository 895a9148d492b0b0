"""What every part uses, and what knows nothing of photos."""
