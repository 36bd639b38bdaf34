"""Why a matmul or a model takes the kernels that it takes, and what they cost."""
