"""What goes into a graph: calibration data, and a call's inputs."""
