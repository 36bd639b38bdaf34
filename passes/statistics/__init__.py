"""What calibration observes and how it is used."""
