"""Programs that call lightrm, run for real: too heavy for the tests, their results lie beside the other benchmarks'."""
