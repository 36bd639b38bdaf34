"""What is found out about a graph by following its data."""
