"""Problems: a model, its loss and data, and what is measured and drawn of them."""
