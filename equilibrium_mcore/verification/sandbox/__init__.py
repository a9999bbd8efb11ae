"""Untrusted Python against unit tests: other user, no network, bounded; expected results stay outside."""
