"""The model file that every stage reads and writes."""
