"""Checkpoints that msModelSlim itself writes, checked and read back: python -m …msmodelslim."""
