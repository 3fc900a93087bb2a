"""A trained model in, figures out."""
