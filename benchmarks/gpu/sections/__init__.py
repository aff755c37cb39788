"""One file for each section of figures; `benchmarks.gpu.section` finds them."""
