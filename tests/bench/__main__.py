"""All benchmarks, or those named: python -m tests.bench [--quick] [rule identity ...]

`--quick`: a few rounds each, to see that they run; the figures mean nothing.
"""

from __future__ import annotations

import argparse

from tests.bench import (
    bench_addresses,
    bench_agent_start,
    bench_allocation,
    bench_cni,
    bench_distribution,
    bench_endpoint,
    bench_events,
    bench_identity,
    bench_identity_api,
    bench_policy_lookup,
    bench_resolve,
    bench_rule,
    bench_traffic,
    figures,
)

FULL = {
    "rule": bench_rule.main,
    "identity": bench_identity.main,
    "identity_api": bench_identity_api.main,
    "allocation": bench_allocation.main,
    "addresses": bench_addresses.main,
    "agent_start": bench_agent_start.main,
    "endpoint": bench_endpoint.main,
    "cni": bench_cni.main,
    "events": bench_events.main,
    "distribution": bench_distribution.main,
    "policy_lookup": bench_policy_lookup.main,
    "resolve": bench_resolve.main,
    "traffic": bench_traffic.main,
}
QUICK = {
    "rule": lambda: bench_rule.main(5),
    "identity": lambda: bench_identity.main(5, ((100, 2),)),
    "identity_api": lambda: bench_identity_api.main(2000, 1, 10, 100),
    "allocation": lambda: bench_allocation.main(1, 0.3, (1, 16), 2000, 10),
    "addresses": lambda: bench_addresses.main(1, 0.3, 5, 2_000),
    "agent_start": lambda: bench_agent_start.main(2),
    "endpoint": lambda: bench_endpoint.main(3),
    "cni": lambda: bench_cni.main(3),
    "events": lambda: bench_events.main(1, 0.3),
    "traffic": lambda: bench_traffic.main(1),
    "distribution": lambda: bench_distribution.main(3),
    "resolve": lambda: bench_resolve.main(2, ((100, 1_000),), 1, 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FULL))
    chosen = parser.parse_args()
    known = QUICK if chosen.quick else FULL
    names = chosen.names or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; choose of {', '.join(known)}")
    print(figures.machine())
    for name in names:
        known[name]()


if __name__ == "__main__":
    main()
