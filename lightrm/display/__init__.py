"""What people see on a terminal or in a notebook: tables, progress bars, and figures as text.

Knows nothing of models, scores or files.
"""
