"""`tessera demo`: a small application in network namespaces, judged by real policies and packets.

scenario.py   who there is, which probes are sent and what each should meet     (data)
policies/     the manifests, as an operator would write them                    (data)
netns.py      namespaces, and sockets that live in them
traffic.py    listeners and probes: TCP, UDP, ICMP over those sockets
evidence.py   probe + the node's own flow events -> row of the table
run.py        set up, probe, collect, take down
command.py    the verb
"""
