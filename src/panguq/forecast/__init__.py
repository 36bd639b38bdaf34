"""What a server takes for a request, and what it needs of the card."""
