"""The kernel's part of a network: namespaces, links, forwarding entries, filters and announcements.

Everything that speaks netlink or nftables is in this folder. Start with `linux.py`.
"""
