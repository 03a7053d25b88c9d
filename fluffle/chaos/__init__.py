"""Faults on purpose: real processes over a real broker, struck by a plan, and what their run came to.

`plan.py` draws the faults, `strikes.py` does them, `scenario.py` runs a federation through them, `audit.py` and
`report.py` say whether anything was lost. `processes.py`, `proxy.py` and `node.py` serve the tests, too.
"""
