"""panguq's own folder: safetensors and JSON, with checksums."""
