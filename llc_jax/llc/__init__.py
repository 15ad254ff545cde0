"""The local learning coefficient: how it is estimated, how sure it is, and what it is worth."""
