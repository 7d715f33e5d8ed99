"""What people see on a terminal or in a notebook: tables, progress bars, sizes as text.

Knows nothing of models, scores or files.
"""
