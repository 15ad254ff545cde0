"""An attention-only transformer that predicts the next token."""
