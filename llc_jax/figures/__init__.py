"""Arrays to matplotlib figures; nothing is read, written or computed but layout."""
