"""What fuse-ascend recognizes, one file an op."""
