"""panguq's Triton kernels as a CUDA GPU runs them: numbers, and when Split-K is faster there."""
