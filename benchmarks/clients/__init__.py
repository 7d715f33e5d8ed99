"""Programs that call lightrm and are too large for CI: each script runs one for real and writes what it found."""
