"""Numeric identities: ranges, scopes, reserved numbers (Cilium ClusterMesh bit layout)."""

from __future__ import annotations

from typing import NewType

NumericIdentity = NewType("NumericIdentity", int)
