"""The ops of graphs: the op set, raised ops, and those that store and restore codes."""
