"""Other programs' interfaces: functions and classes in the form that trainers and Ray Data call. None of those programs
is imported; nothing in lightrm imports this wing.
"""
