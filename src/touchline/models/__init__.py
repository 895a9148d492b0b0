"""Networks, and photos through them."""
