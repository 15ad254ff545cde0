"""What people hand in: checked, and made into arrays, before anything compiles."""
