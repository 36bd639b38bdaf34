"""openPangu's configuration, tokenizer and chat template."""
