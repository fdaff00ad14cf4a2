"""Scoring a stream of tokens with a trained model, with and without the continuous cache."""
