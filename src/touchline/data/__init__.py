"""Photos, and what is known of them."""
