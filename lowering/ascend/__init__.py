"""Lowering for Ascend NPUs."""
