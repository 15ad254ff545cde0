"""A transformer that learns linear regression in context."""
