"""How long the ops of CANN take that a lowered graph calls: one small model an op, fitted."""
