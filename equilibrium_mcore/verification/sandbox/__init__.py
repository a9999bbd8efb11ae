"""Untrusted Python against unit tests: no network, bounded; expected results stay outside."""
