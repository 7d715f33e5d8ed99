"""What scores are worth: agreement, exact rankings, calibration, the fidelity report. numpy on scores.

Scores of any model can be judged: nothing here knows models, and torch is never imported.
"""
