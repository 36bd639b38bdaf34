"""panguq's own NPU kernels: contract, body, fake, and tiles."""
