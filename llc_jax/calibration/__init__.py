"""Settings for an estimate, found by pilot chains and a grid, with reasons."""
