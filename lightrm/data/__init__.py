"""Records and preferences as people publish them: JSONL, CSV, Parquet, and the forms that a record may have.

Gives prompts and answers; knows no model and no score but those that the data itself holds.
"""
