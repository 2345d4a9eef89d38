"""Flows: what was let through or dropped, between whom, and by which rule.

flow.py is the record, filters.py chooses among records, ring.py keeps the newest ones in bounded
memory. Shared by the node agent and whatever joins the flows of many nodes.
"""
