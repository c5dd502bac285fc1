"""Build candidates, run them, check what they compute; or answer from records."""
