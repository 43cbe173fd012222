"""Attacks of hostile containers, processes and hosts, and what they must not achieve."""
