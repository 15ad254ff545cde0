"""Deep linear networks: singular models whose learning coefficient is known."""
