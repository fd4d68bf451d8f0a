"""Distil a Transformer language model into a compact LSTM language model."""

__version__ = "0.1.0"
