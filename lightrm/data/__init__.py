"""Records and preferences as people publish them: JSONL, CSV, Parquet, and the forms that a record may have.

Yields prompts and answers; knows no model, and no scores but those that the data holds.
"""
