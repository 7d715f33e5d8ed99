"""A conversation to token ids: template, tokenizer, and that what a user wrote never becomes a special token.

Knows no weights and no files but those of a tokenizer.
"""
