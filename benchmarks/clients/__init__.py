"""Other programs that call lightrm, run with their own code."""
