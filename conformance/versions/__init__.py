"""Which releases panguq works with: the oldest, the newest, other ones of torch, a bare install.

Run by `make test-oldest`, `test-newest`, `test-torch`, `test-wheel`, `constraints`, `pythons`;
docs/installing.md says what they found.
"""
