"""From a conversation to token ids: templates, tokenizers, and the rule that user text never acts as a special token.

Knows no weights, and no files but those of a tokenizer.
"""
